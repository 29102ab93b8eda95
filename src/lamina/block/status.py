"""What a disk holds across its whole backing chain, and what of it is known to read as zeroes.

``Node.extents`` speaks of one layer. Here ``Kind.BELOW`` is followed down the chain: filters are no
layers, what lies behind the end of a shorter backing file is zero, and data that lies in a hole of
the file underneath is known to read as zeroes, though it has its place.
"""

from __future__ import annotations

from collections.abc import Iterator

from lamina.block.extents import Columns, Extent, Kind
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node


class Status(NamedTuple):
    """A run of the disk that shares one fate."""

    extent: Extent
    """``Kind.BELOW``: no layer of the chain holds these bytes."""
    depth: int
    """Which layer answered: 0 is the disk itself, 1 its backing file, …"""
    reads_zero: bool
    """Known to read as zeroes, whatever its kind."""


class ChainColumns(NamedTuple):
    """``Columns`` of a whole chain with, row by row, the two other fields of ``Status``."""

    columns: Columns
    depth: npt.NDArray[np.uint16]
    reads_zero: npt.NDArray[np.bool_]


def chain(node: Node, base: Node | None = None) -> list[Node]:
    """The layers from ``node`` down to the last one, or to the one above ``base``.

    Filters on top of a layer belong to it.
    """
    layers = []
    layer: Node | None = node
    stop = base.unfiltered if base is not None else None
    while layer is not None and layer.unfiltered is not stop:
        layers.append(layer)
        layer = layer.unfiltered.backing
    return layers


def chain_extents(
    node: Node, offset: int, length: int, base: Node | None = None, *, look_for_holes: bool = True
) -> list[Status]:
    """What these bytes are, in order, without gaps, neighbours of one fate joined.

    ``base``: a layer that is not asked any more; what comes from there stays ``Kind.BELOW`` and
    is not known to be zero. What lies behind its end is.
    Without ``look_for_holes`` the files underneath are not asked about theirs.
    """
    layers = chain(node, base)
    found: list[Status] = []
    _descend(layers, 0, offset, length, base, found)
    if look_for_holes:
        sparse = {id(layer) for layer in layers if _may_lie_in_holes(layer)}
        if sparse:
            found = [
                part
                for status in found
                for part in (
                    _split_at_holes(status) if id(layers[status.depth]) in sparse else [status]
                )
            ]
    return _joined(found)


def _descend(
    layers: list[Node],
    depth: int,
    offset: int,
    length: int,
    base: Node | None,
    found: list[Status],
) -> None:
    """Append what layer ``depth`` says of a range within its size, asking below where it must."""
    last = depth + 1 == len(layers)
    below = base if last else layers[depth + 1]
    for extent in layers[depth].extents(offset, length):
        if extent.kind != Kind.BELOW:
            reads_zero = extent.kind == Kind.ZERO
            if reads_zero and extent.stored_length:
                extent = extent._replace(kind=Kind.DATA, stored_length=0)
            found.append(Status(extent, depth, reads_zero))
            continue
        inside = 0
        if below is not None:
            inside = max(min(extent.end, below.size) - extent.guest_offset, 0)
        if inside and last:
            part = extent.cut(extent.guest_offset, extent.guest_offset + inside)
            found.append(Status(part, depth, False))
        elif inside:
            _descend(layers, depth + 1, extent.guest_offset, inside, base, found)
        if inside < extent.length:
            rest = extent.cut(extent.guest_offset + inside, extent.end)
            if below is not None and rest.host_offset >= 0:
                # It is the backing file that has nothing there.
                rest = rest._replace(node=None, host_offset=-1)
            # What is absent for all that anybody knows is no zeroes (a dirty bitmap over NBD).
            known = rest.node is None or rest.host_offset >= 0
            found.append(Status(rest, depth, known))


def _may_lie_in_holes(layer: Node) -> bool:
    """Whether the file of an image has so many holes that its data may lie in some.

    Asking a file for its holes is slow on some file systems, and in vain unless metadata was
    preallocated: so do it only if a tenth of what the image uses is not really there, or if the
    format knows nothing of zeroes itself.
    """
    node = layer.unfiltered
    if node.may_lie_in_holes is None:
        try:
            node.may_lie_in_holes = node.fixed or (
                node.is_format and "file" in node.children and _is_sparse(node)
            )
        except LaminaError:
            return False
    return node.may_lie_in_holes


def _is_sparse(node: Node) -> bool:
    cluster = node.info().cluster_size
    actual = node.file.info().actual_size
    if not cluster or actual is None:
        return False
    there = actual // cluster
    # Of the clusters in use two and a tenth are not there, but for the five that every image has.
    fewest = max(there + 2, -(-(10 * there - 5) // 9))
    return node.uses_more_than((fewest - 1) * cluster)


def _split_at_holes(status: Status) -> list[Status]:
    """The parts of a run of data, each known to lie in a hole of its file or not."""
    extent = status.extent
    if extent.kind != Kind.DATA or extent.node is None or extent.cipher is not None:
        return [status]
    inside = max(min(extent.length, extent.node.size - extent.host_offset), 0)
    parts = []
    shift = extent.guest_offset - extent.host_offset
    if inside:
        for piece in extent.node.extents(extent.host_offset, inside):
            cut = extent.cut(piece.guest_offset + shift, piece.end + shift)
            parts.append(status._replace(extent=cut, reads_zero=piece.kind == Kind.ZERO))
    if inside < extent.length:
        # Behind the end of a file there is nothing but zeroes.
        rest = extent.cut(extent.guest_offset + inside, extent.end)
        parts.append(status._replace(extent=rest, reads_zero=True))
    return parts


def _joined(found: list[Status]) -> list[Status]:
    result: list[Status] = []
    for status in found:
        if result and _continues(result[-1], status):
            extent = result[-1].extent
            longer = extent._replace(length=extent.length + status.extent.length)
            result[-1] = result[-1]._replace(extent=longer)
        else:
            result.append(status)
    return result


def _continues(one: Status, other: Status) -> bool:
    a, b = one.extent, other.extent
    return (
        one.depth == other.depth
        and one.reads_zero == other.reads_zero
        and a.kind == b.kind
        and a.kind not in (Kind.ENCODED, Kind.INLINE)
        and a.node is b.node
        and a.cipher is b.cipher
        and (a.host_offset + a.length == b.host_offset or a.host_offset == b.host_offset == -1)
    )


# -- whole images ----------------------------------------------------------------------------------


def chain_columns(node: Node, offset: int = 0, length: int | None = None) -> Iterator[ChainColumns]:
    """``chain_extents`` as arrays, piece after piece: no Python object per cluster."""
    layers = chain(node)
    end = node.size if length is None else offset + length
    sparse = [_may_lie_in_holes(layer) for layer in layers]
    for columns in layers[0].columns(offset, end - offset) if end > offset else ():
        yield _complete(layers, 0, columns, sparse)


def _complete(
    layers: list[Node], depth: int, columns: Columns, sparse: list[bool]
) -> ChainColumns:
    """Rows of layer ``depth`` with those filled in that say BELOW."""
    import numpy as np

    last = depth + 1 == len(layers)
    reads_zero = (columns.kind == Kind.ZERO) | (columns.kind == Kind.BELOW)
    here = ChainColumns(columns, np.full(len(columns.kind), depth, np.uint16), reads_zero)
    if sparse[depth]:
        here = _columns_split_at_holes(here)
    if last or not (here.columns.kind == Kind.BELOW).any():
        return here
    # It is the backing file that has nothing where nobody has.
    columns.host_offset[columns.kind == Kind.BELOW] = -1
    start = int(columns.guest_offset[0])
    stop = min(int(columns.guest_offset[-1] + columns.length[-1]), layers[depth + 1].size)
    if stop <= start:
        return here
    for below in layers[depth + 1].columns(start, stop - start):
        here = _overlay(here, _complete(layers, depth + 1, below, sparse))
    return here


def _overlay(top: ChainColumns, below: ChainColumns) -> ChainColumns:
    """``top`` with its BELOW rows replaced by what ``below`` says, as far as that reaches."""
    import numpy as np

    def ends(columns: Columns) -> npt.NDArray[np.int64]:
        return columns.guest_offset + columns.length

    first, last = int(below.columns.guest_offset[0]), int(ends(below.columns)[-1])
    starts = np.unique(
        np.concatenate((top.columns.guest_offset, below.columns.guest_offset, [last]))
    )
    end = int(ends(top.columns)[-1])
    starts = starts[(starts >= top.columns.guest_offset[0]) & (starts < end)]
    lengths = np.diff(np.append(starts, end))
    upper = _rows_at(top, starts, lengths)
    lower = _rows_at(below, np.clip(starts, first, last - 1), lengths)
    take = (upper.columns.kind == Kind.BELOW) & (starts >= first) & (starts < last)
    nodes = top.columns.nodes + below.columns.nodes
    lower_node = lower.columns.node + len(top.columns.nodes)

    def pick(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.where(take, b, a).astype(a.dtype, copy=False)

    columns = Columns(
        starts,
        lengths,
        pick(upper.columns.kind, lower.columns.kind),  # type: ignore[arg-type]
        pick(upper.columns.host_offset, lower.columns.host_offset),  # type: ignore[arg-type]
        pick(upper.columns.stored_length, lower.columns.stored_length),  # type: ignore[arg-type]
        pick(upper.columns.node, lower_node),  # type: ignore[arg-type]
        nodes,
    )
    return _columns_joined(
        ChainColumns(
            columns,
            pick(upper.depth, lower.depth),  # type: ignore[arg-type]
            pick(upper.reads_zero, lower.reads_zero),  # type: ignore[arg-type]
        )
    )


def _rows_at(
    rows: ChainColumns, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> ChainColumns:
    """Cut so that rows begin at these guest offsets, each of which lies inside of one row."""
    import numpy as np

    old = rows.columns
    index = np.searchsorted(old.guest_offset, starts, side="right") - 1
    skip = starts - old.guest_offset[index]
    host = old.host_offset[index]
    moves = (host >= 0) & (old.kind[index] != Kind.ENCODED)
    columns = Columns(
        starts,
        lengths,
        old.kind[index],
        np.where(moves, host + skip, host),
        old.stored_length[index],
        old.node[index],
        old.nodes,
    )
    return ChainColumns(columns, rows.depth[index], rows.reads_zero[index])


def _columns_split_at_holes(rows: ChainColumns) -> ChainColumns:
    """Split DATA rows where holes of their file begin and end, and mark those inside of holes."""
    import numpy as np

    for number, node in enumerate(rows.columns.nodes):
        if node is None:
            continue
        data = (rows.columns.kind == Kind.DATA) & (rows.columns.node == number)
        if not data.any():
            continue
        pieces = node.extents(0, node.size) if node.size else []
        # Boundaries between runs of data and holes; zeroes follow behind the end of the file.
        edges = np.array([piece.guest_offset for piece in pieces] + [node.size], np.int64)
        hole = np.array([piece.kind == Kind.ZERO for piece in pieces] + [True], bool)
        rows = _cut_at_host_offsets(rows, data, edges)
        data = (rows.columns.kind == Kind.DATA) & (rows.columns.node == number)
        index = np.searchsorted(edges, rows.columns.host_offset, side="right") - 1
        rows.reads_zero[data] = hole[index[data]]
    return _columns_joined(rows)


def _cut_at_host_offsets(
    rows: ChainColumns, which: npt.NDArray[np.bool_], edges: npt.NDArray[np.int64]
) -> ChainColumns:
    import numpy as np

    old = rows.columns
    host, length = old.host_offset[which], old.length[which]
    first = np.searchsorted(edges, host, side="right")
    count = np.searchsorted(edges, host + length, side="left") - first
    # For every row, the edges strictly inside of it: first, first + 1, … (count of them).
    row = np.repeat(np.arange(len(host)), count)
    within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    cuts = edges[first[row] + within] - host[row] + old.guest_offset[which][row]
    if not len(cuts):
        return rows
    starts = np.union1d(old.guest_offset, cuts)
    end = int(old.guest_offset[-1] + old.length[-1])
    return _rows_at(rows, starts, np.diff(np.append(starts, end)))


def _columns_joined(rows: ChainColumns) -> ChainColumns:
    """Join neighbours of one fate."""
    import numpy as np

    old = rows.columns
    same = (
        (old.kind[1:] == old.kind[:-1])
        & (old.kind[1:] != Kind.ENCODED)
        & (old.kind[1:] != Kind.INLINE)
        & (old.node[1:] == old.node[:-1])
        & (rows.depth[1:] == rows.depth[:-1])
        & (rows.reads_zero[1:] == rows.reads_zero[:-1])
        & np.where(
            old.host_offset[1:] < 0,
            old.host_offset[:-1] < 0,
            old.host_offset[1:] == old.host_offset[:-1] + old.length[:-1],
        )
    )
    if not same.any():
        return rows
    keep = np.append(True, ~same)
    starts = old.guest_offset[keep]
    end = int(old.guest_offset[-1] + old.length[-1])
    columns = Columns(
        starts,
        np.diff(np.append(starts, end)),
        old.kind[keep],
        old.host_offset[keep],
        old.stored_length[keep],
        old.node[keep],
        old.nodes,
    )
    return ChainColumns(columns, rows.depth[keep], rows.reads_zero[keep])
