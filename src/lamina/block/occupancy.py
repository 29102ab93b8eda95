"""How many units of a new image the data of a source would take: what measuring comes down to."""

from __future__ import annotations

from lamina.block.extents import Kind
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node

_MANY = 1 << 16
"""Units of the source beyond which it pays to load numpy."""


def data_units(source: Node, unit: int) -> int:
    """Units of ``unit`` bytes in which ``source``, with all that is below it, holds data."""
    if source.size // unit > _MANY:
        return _data_units_of_columns(source, unit)
    from lamina.block.status import chain_extents

    step = unit << 12
    units, last = 0, -1
    for start in range(0, source.size, step):
        for extent, _, zero in chain_extents(source, start, min(step, source.size - start)):
            if zero or extent.kind in (Kind.BELOW, Kind.ZERO):
                continue
            first = extent.guest_offset // unit
            units -= first == last
            last = (extent.end - 1) // unit
            units += last - first + 1
    return units


def _data_units_of_columns(source: Node, unit: int) -> int:
    import numpy as np

    from lamina.block.status import chain_columns

    units, before = 0, -1
    for piece in chain_columns(source):
        columns = piece.columns
        held = ~piece.reads_zero & (columns.kind != Kind.BELOW)
        first = columns.guest_offset[held] // unit
        if not len(first):
            continue
        last = (columns.guest_offset[held] + columns.length[held] - 1) // unit
        # Neighbouring rows may lie in one cluster.
        shared = int(np.count_nonzero(first[1:] == last[:-1])) + (int(first[0]) == before)
        units += int((last - first).sum()) + len(first) - shared
        before = int(last[-1])
    return units
