"""Where the data of a disk is, as ``map`` shows it: runs of one fate, across the backing chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from lamina.block.extents import Kind
from lamina.block.status import chain, chain_columns, chain_extents

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node
    from lamina.block.status import ChainColumns, Status

_MANY_UNITS = 1 << 16
"""Allocation units beyond which it pays to load numpy and work with columns."""
_STEP = 1 << 30
"""Bytes of the disk looked at in one go without columns."""
_BLOCK = 1 << 16
"""Rows in one block, at most."""


class Fate(NamedTuple):
    """What is said of a run, beside where it is."""

    depth: int
    """Layer that answers: 0 is the disk itself, 1 its backing file, …"""
    present: bool
    """Some layer has something to say about these bytes."""
    zero: bool
    """Known to read as zeroes."""
    data: bool
    """Reading looks at stored bytes."""
    compressed: bool
    file: Node | None
    """Where the offset of the run points into; None: the run has no offset."""


class Rows(NamedTuple):
    """A block of runs in order, as lists: bulk formatting wants no object per run.

    Figures in bytes. ``fates[fate[i]]`` belongs to run i; ``offset`` is -1 where there is none.
    """

    start: list[int]
    length: list[int]
    fate: list[int]
    offset: list[int]
    fates: list[Fate]


def map_rows(node: Node, offset: int, length: int) -> Iterator[Rows]:
    """The runs of this range, which lies inside the disk; neighbours of one fate are joined."""
    if _is_large(node, length):
        blocks = _from_columns(node, offset, length)
    else:
        blocks = _from_extents(node, offset, length)
    return _joined(blocks)


def _is_large(node: Node, length: int) -> bool:
    units = [layer.unfiltered.info().cluster_size for layer in chain(node)]
    return any(length // unit > _MANY_UNITS for unit in units if unit)


class _Fates:
    """The few fates that occur, numbered, and the rule that makes one."""

    def __init__(self, node: Node) -> None:
        self.all: list[Fate] = []
        self._number: dict[Fate, int] = {}
        self._encrypted = [layer.unfiltered.info().encrypted for layer in chain(node)]

    def number(
        self, kind: int, depth: int, reads_zero: bool, has_offset: bool, file: Node | None
    ) -> int:
        plain = kind in (Kind.DATA, Kind.ZERO) and not self._encrypted[depth]
        fate = Fate(
            depth,
            kind != Kind.BELOW,
            reads_zero,
            kind in (Kind.DATA, Kind.ENCODED, Kind.INLINE),
            kind == Kind.ENCODED,
            file if plain and has_offset else None,
        )
        if fate not in self._number:
            self._number[fate] = len(self.all)
            self.all.append(fate)
        return self._number[fate]


def _from_extents(node: Node, offset: int, length: int) -> Iterator[Rows]:
    fates = _Fates(node)
    end = offset + length
    for start in range(offset, end, _STEP):
        rows = Rows([], [], [], [], fates.all)
        for status in chain_extents(node, start, min(_STEP, end - start)):
            _append(rows, fates, status)
        yield rows


def _append(rows: Rows, fates: _Fates, status: Status) -> None:
    extent = status.extent
    number = fates.number(
        extent.kind, status.depth, status.reads_zero, extent.host_offset >= 0, extent.node
    )
    offset = extent.host_offset if fates.all[number].file is not None else -1
    if rows.fate and rows.fate[-1] == number and _continues(rows, offset):
        rows.length[-1] += extent.length
        return
    rows.start.append(extent.guest_offset)
    rows.length.append(extent.length)
    rows.fate.append(number)
    rows.offset.append(offset)


def _continues(rows: Rows, offset: int) -> bool:
    """Whether a run of the same fate at ``offset`` goes on where the last one ends."""
    last = rows.offset[-1]
    return offset == (last + rows.length[-1] if last >= 0 else -1)


def _from_columns(node: Node, offset: int, length: int) -> Iterator[Rows]:
    fates = _Fates(node)
    for piece in chain_columns(node, offset, length):
        start, lengths, fate, host = _join_columns(piece, *_fate_columns(piece, fates))
        for first in range(0, len(start), _BLOCK):
            part = slice(first, first + _BLOCK)
            yield Rows(
                start[part].tolist(),
                lengths[part].tolist(),
                fate[part].tolist(),
                host[part].tolist(),
                fates.all,
            )


def _fate_columns(
    piece: ChainColumns, fates: _Fates
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number of the fate and offset of each row."""
    import numpy as np

    columns = piece.columns
    code = columns.kind.astype(np.int64)
    code |= columns.node.astype(np.int64) << 4
    code |= piece.depth.astype(np.int64) << 12
    code |= piece.reads_zero.astype(np.int64) << 28
    code |= (columns.host_offset >= 0).astype(np.int64) << 29
    found, index = np.unique(code, return_inverse=True)
    numbers = [
        fates.number(
            one & 15,
            one >> 12 & 0xFFFF,
            bool(one >> 28 & 1),
            bool(one >> 29 & 1),
            columns.nodes[one >> 4 & 0xFF],
        )
        for one in found.tolist()
    ]
    has_offset = np.array([fates.all[number].file is not None for number in numbers], bool)
    host = np.where(has_offset[index], columns.host_offset, -1)
    return np.array(numbers, np.int64)[index], host


def _join_columns(
    piece: ChainColumns, fate: npt.NDArray[np.int64], host: npt.NDArray[np.int64]
) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]
]:
    """Start, length, fate and offset of the rows after joining."""
    import numpy as np

    start, length = piece.columns.guest_offset, piece.columns.length
    if not len(start):
        return start, length, fate, host
    expected = np.where(host >= 0, host + length, -1)
    same = (fate[1:] == fate[:-1]) & (host[1:] == expected[:-1])
    keep = np.append(True, ~same)
    end = start[-1] + length[-1]
    start = start[keep]
    return start, np.diff(np.append(start, end)), fate[keep], host[keep]


def _joined(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """Join the last run of a block with the first one of the next."""
    held: Rows | None = None
    for rows in blocks:
        if not rows.start:
            continue
        if held is not None:
            if held.fate[-1] == rows.fate[0] and _continues(held, rows.offset[0]):
                rows.start[0], rows.offset[0] = held.start.pop(), held.offset.pop()
                rows.length[0] += held.length.pop()
                held.fate.pop()
            if held.start:
                yield held
        held = rows
    if held is not None:
        yield held
