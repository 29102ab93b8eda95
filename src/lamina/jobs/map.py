"""Where the data of a disk is, as ``map`` shows it: runs of one fate, across the backing chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lamina.block.extents import Kind
from lamina.block.status import chain, chain_columns, chain_extents
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node
    from lamina.block.status import ChainColumns, Status

    Integers = npt.NDArray[np.int64]
    Numbers = list[int] | Integers

_MANY_UNITS = 1 << 16
"""Allocation units beyond which it pays to load numpy and work with columns."""
_STEP = 1 << 30
"""Bytes of the disk looked at in one go without columns."""
_BLOCK = 1 << 12
"""Rows in one block, at most: their text fits the caches."""


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
    """A block of runs in order. The figures are lists, or arrays where there are many.

    Figures in bytes. ``fates[fate[i]]`` belongs to run i; ``offset`` is -1 where there is none.
    """

    start: Numbers
    length: Numbers
    fate: Numbers
    offset: Numbers
    fates: list[Fate]

    def without_last(self) -> Rows:
        return Rows(
            self.start[:-1], self.length[:-1], self.fate[:-1], self.offset[:-1], self.fates
        )

    def as_lists(self) -> list[list[int]]:
        """Starts, lengths, fates and offsets."""
        return [one if isinstance(one, list) else one.tolist() for one in self[:4]]


def map_rows(node: Node, offset: int, length: int) -> Iterator[Rows]:
    """The runs of this range, which lies inside the disk; neighbours of one fate are joined."""
    if _is_large(node, length):
        blocks = _from_columns(node, offset, length)
    else:
        blocks = _from_extents(node, offset, length)
    return _joined(blocks)


def _is_large(node: Node, length: int) -> bool:
    return any(length // _unit(layer.unfiltered) > _MANY_UNITS for layer in chain(node))


def _unit(layer: Node) -> int:
    """Bytes that have one fate in a layer. Not every format tells its clusters to people."""
    unit = layer.info().cluster_size or layer.limits.write_zeroes_alignment
    return unit if unit > SECTOR else _STEP


class _Fates:
    """The few fates that occur, numbered, and the rule that makes one."""

    def __init__(self, node: Node) -> None:
        self.all: list[Fate] = []
        self._number: dict[Fate, int] = {}
        self._encrypted = [layer.unfiltered.info().encrypted for layer in chain(node)]

    def number(
        self, kind: int, depth: int, reads_zero: bool, has_offset: bool, file: Node | None
    ) -> int:
        plain = kind not in (Kind.ENCODED, Kind.INLINE) and not self._encrypted[depth]
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
        block = _Block()
        for status in chain_extents(node, start, min(_STEP, end - start)):
            block.append(fates, status)
        yield Rows(block.start, block.length, block.fate, block.offset, fates.all)


class _Block:
    """Runs being collected one by one."""

    def __init__(self) -> None:
        self.start: list[int] = []
        self.length: list[int] = []
        self.fate: list[int] = []
        self.offset: list[int] = []

    def append(self, fates: _Fates, status: Status) -> None:
        extent = status.extent
        number = fates.number(
            extent.kind, status.depth, status.reads_zero, extent.host_offset >= 0, extent.node
        )
        offset = extent.host_offset if fates.all[number].file is not None else -1
        if self.fate and self.fate[-1] == number and offset == _next_offset(self):
            self.length[-1] += extent.length
            return
        self.start.append(extent.guest_offset)
        self.length.append(extent.length)
        self.fate.append(number)
        self.offset.append(offset)


def _next_offset(rows: Rows | _Block) -> int:
    """The offset of a run that carries on the last one."""
    last = int(rows.offset[-1])
    return last + int(rows.length[-1]) if last >= 0 else -1


def _from_columns(node: Node, offset: int, length: int) -> Iterator[Rows]:
    fates = _Fates(node)
    for piece in chain_columns(node, offset, length):
        columns = _join_columns(piece, *_fate_columns(piece, fates))
        for first in range(0, len(columns[0]), _BLOCK):
            start, lengths, fate, host = (one[first : first + _BLOCK] for one in columns)
            yield Rows(start, lengths, fate, host, fates.all)


def _fate_columns(piece: ChainColumns, fates: _Fates) -> tuple[Integers, Integers]:
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
    piece: ChainColumns, fate: Integers, host: Integers
) -> tuple[Integers, Integers, Integers, Integers]:
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
        if not len(rows.start):
            continue
        if held is not None:
            if held.fate[-1] == rows.fate[0] and rows.offset[0] == _next_offset(held):
                rows.start[0], rows.offset[0] = held.start[-1], held.offset[-1]
                rows.length[0] += held.length[-1]
                held = held.without_last()
            if len(held.start):
                yield held
        held = rows
    if held is not None:
        yield held
