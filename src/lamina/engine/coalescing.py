"""From what each allocation unit says to runs: as a list of extents, or as arrays."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.block.extents import Columns, Extent, Kind
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node


def append_extent(extents: list[Extent], extent: Extent) -> None:
    """What follows the others: a part of the last one, where both are of one kind and, if they are
    data, adjoin in one file too."""
    if extents:
        last = extents[-1]
        kind = last.kind
        if kind is extent.kind and (
            last.node is extent.node and last.host_offset + last.length == extent.host_offset
            if kind is Kind.DATA
            else kind is not Kind.ENCODED
        ):
            extents[-1] = last._replace(length=last.length + extent.length)
            return
    extents.append(extent)


def extents_of_units(
    offset: int, end: int, units: Iterable[tuple[int, Kind, int]], file: Node
) -> list[Extent]:
    """The extents between two guest offsets.

    ``units``: guest offset, kind (DATA, ZERO or BELOW) and host offset (-1: none) of runs of equal
    units or single ones, in order and without gaps; the first holds ``offset``.
    """
    extents: list[Extent] = []
    kind, start, host = Kind.INLINE, offset, -1  # the run so far; none begins as INLINE
    for guest, what, place in units:
        if what is kind and (place < 0 or place == host + guest - start):
            continue
        if guest > offset:
            extents.append(_extent(start, guest, kind, host, file))
        kind, start = what, max(guest, offset)
        host = place if place < 0 else place + start - guest
    if end > start:
        extents.append(_extent(start, end, kind, host, file))
    return extents


def _extent(start: int, end: int, kind: Kind, host: int, file: Node) -> Extent:
    return Extent(start, end - start, kind, file if kind is Kind.DATA else None, host)


def columns_of_units(
    offset: int,
    end: int,
    first: int,
    unit: int,
    kind: npt.NDArray[np.uint8],
    host: npt.NDArray[np.int64],
    file: Node,
) -> Columns:
    """The same as arrays.

    ``kind`` and ``host`` (-1 but for DATA) say it of each unit of ``unit`` bytes from guest offset
    ``first`` on; together they cover the range from ``offset`` to ``end``.
    """
    import numpy as np

    data = kind == Kind.DATA
    goes_on = (kind[1:] == kind[:-1]) & (~data[1:] | (np.diff(host) == unit))
    rows = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    guest = first + rows * unit
    kind, host = kind[rows], host[rows]
    if guest[0] < offset:
        host[0] += offset - guest[0] if host[0] >= 0 else 0
        guest[0] = offset
    return Columns(
        guest,
        np.diff(guest, append=end),
        kind,
        host,
        np.zeros(len(rows), dtype=np.int64),
        (kind != Kind.DATA).astype(np.uint8),
        (file, None),
    )
