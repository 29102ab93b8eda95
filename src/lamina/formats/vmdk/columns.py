"""What a sparse extent holds, as arrays: no Python object per grain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lamina.block.extents import Columns, Kind
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR

if TYPE_CHECKING:
    import numpy.typing as npt

    from lamina.formats.vmdk.extents import GrainExtent

_STEP = 1 << 20
"""Grains that are looked at at a time."""


def grain_columns(extent: GrainExtent, offset: int, length: int) -> Iterator[Columns]:
    """Rows that cover this part of the disk, which lies inside of the extent."""
    grain = extent.grain
    end = offset + length
    step = _STEP * grain
    while offset < end:
        first = (offset - extent.start) // grain
        stop = min(end, extent.start + first * grain + step)
        yield _rows(extent, first, offset, stop)
        offset = stop


def _rows(extent: GrainExtent, first: int, offset: int, end: int) -> Columns:
    grain = extent.grain
    count = -(-(end - extent.start) // grain) - first
    sectors = extent.entries_array(first, count)
    assert isinstance(sectors, np.ndarray)
    start = extent.start + (first + np.arange(count, dtype=np.int64)) * grain
    there = sectors > 1
    host = np.where(there, sectors * SECTOR, -1)
    wrong = host >= extent.file_end
    if wrong.any():
        index = int(np.argmax(wrong))
        extent.place(int(start[index]), int(sectors[index]))
    data = Kind.ENCODED if extent.compressed else Kind.DATA
    kind = np.where(there, data, np.where(sectors == 1, Kind.ZERO, Kind.BELOW)).astype(np.uint8)
    same = kind[1:] == kind[:-1]
    if extent.compressed:
        same &= ~there[1:]
    else:
        same &= ~there[1:] | (host[1:] == host[:-1] + grain)
    keep = np.append(True, ~same)
    stored = _stored(extent, sectors, there)[keep]
    start, host, kind = start[keep], host[keep], kind[keep]
    # The first row begins inside of a grain, perhaps.
    skip = offset - int(start[0])
    if skip:
        start[0] += skip
        if kind[0] == Kind.DATA:
            host[0] += skip
    return Columns(
        start,
        np.diff(np.append(start, end)),
        kind,
        host,
        stored,
        (kind == Kind.BELOW).astype(np.uint8) | (kind == Kind.ZERO).astype(np.uint8),
        (extent.node, None),
    )


def _stored(
    extent: GrainExtent, sectors: npt.NDArray[np.int64], there: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Bytes of compressed grains, at most; 0 for all others."""
    if not extent.compressed:
        return np.zeros(len(sectors), np.int64)
    most = 2 * extent.grain
    gap = np.append((sectors[1:] - sectors[:-1]) * SECTOR, most)
    return np.where(there, np.where((gap > 0) & (gap < most), gap, most), 0)
