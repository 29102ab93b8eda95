"""Where the sectors of a UDIF image are: in chunks, most of them encoded, in any order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.info import NodeInfo
from lamina.engine.coalescing import append_extent
from lamina.engine.read_only import ReadOnlyMapping
from lamina.errors import ImageUnsupported
from lamina.formats.dmg.layout import (
    CODECS,
    IGNORE,
    RAW,
    TRAILER_SIZE,
    UNREADABLE,
    ZERO,
    BlockTable,
    Chunks,
    Trailer,
    find_trailer,
    parse_trailer,
)
from lamina.formats.dmg.tables import read_tables
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.engine.disk import Disk

_TAIL = 2 * TRAILER_SIZE
"""Bytes at the end of the file in which the trailer is looked for."""


class DmgMapping(ReadOnlyMapping):
    driver = "dmg"

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.trailer, self.end = read_trailer(self.file)
        if self.trailer.segments > 1:
            raise ImageUnsupported(
                "Images in several segments are not supported",
                format="dmg",
                structure="trailer",
                field="segment count",
            )
        self.size = self.trailer.sectors * SECTOR
        self.tables: list[BlockTable] = read_tables(self.file, self.trailer, self.end)
        chunks = Chunks.none()
        for table in self.tables:
            chunks.extend(table.chunks)
        self.chunks = chunks.in_order()
        for kind in dict.fromkeys(kind for table in self.tables for kind in table.unknown):
            disk.context.warn(
                f"warning: Image contains chunks of unknown type {kind:x}, accessing them will "
                "result in I/O errors"
            )

    def resolve(self, offset: int, length: int) -> list[Extent]:
        end = offset + length
        chunks = self.chunks
        starts = chunks.guest_offset
        count = len(starts)
        row = max(bisect_right(starts, offset) - 1, 0)
        extents: list[Extent] = []
        at = offset
        while at < end:
            if row < count and starts[row] + chunks.length[row] <= at:
                row += 1
                continue
            if row < count and starts[row] <= at:
                stop = min(starts[row] + chunks.length[row], end)
                extent = self._extent(row, at, stop)
                row += 1
            else:
                stop = min(starts[row], end) if row < count else end
                extent = self._encoded(at, stop, UNREADABLE, 0, 0, at, stop - at)
            append_extent(extents, extent)
            at = stop
        return extents

    def _extent(self, row: int, start: int, end: int) -> Extent:
        kind, first, length, host_offset, stored = (column[row] for column in self.chunks)
        if kind in (ZERO, IGNORE):
            return Extent(start, end - start, Kind.ZERO)
        if kind == RAW:
            return Extent(start, end - start, Kind.DATA, self.file, host_offset + start - first)
        return self._encoded(start, end, kind, host_offset, stored, first, length)

    def _encoded(
        self,
        start: int,
        end: int,
        kind: int,
        host_offset: int,
        stored: int,
        unit_offset: int,
        unit_length: int,
    ) -> Extent:
        return Extent(
            start,
            end - start,
            Kind.ENCODED,
            self.file,
            host_offset,
            stored_length=stored,
            codec=CODECS[kind],
            unit_offset=unit_offset,
            unit_length=unit_length,
        )

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        """Whole chunks as they stand; whatever is not one of those goes by way of extents."""
        import numpy as np

        chunks = self.chunks
        starts = np.frombuffer(chunks.guest_offset, np.int64) if chunks.type else np.zeros(0, int)
        ends = starts + (np.frombuffer(chunks.length, np.int64) if chunks.type else 0)
        first = int(np.searchsorted(starts, offset))
        last = int(np.searchsorted(ends, offset + length, "right"))
        whole = first < last and not np.any(starts[first + 1 : last] != ends[first : last - 1])
        if not whole:
            yield from super().columns(offset, length)
            return
        begin, stop = int(starts[first]), int(ends[last - 1])
        if offset < begin:
            yield from super().columns(offset, begin - offset)
        yield self._rows(first, last)
        if stop < offset + length:
            yield from super().columns(stop, offset + length - stop)

    def _rows(self, first: int, last: int) -> Columns:
        import numpy as np

        kinds, starts, lengths, hosts, stored = (
            np.frombuffer(column, dtype)[first:last]
            for column, dtype in zip(
                self.chunks, (np.uint32, np.int64, np.int64, np.int64, np.int64), strict=True
            )
        )
        kind = np.full(len(kinds), Kind.ENCODED, np.uint8)
        kind[(kinds == ZERO) | (kinds == IGNORE)] = Kind.ZERO
        kind[kinds == RAW] = Kind.DATA
        host = np.where(kind == Kind.ZERO, -1, hosts)
        same = kind[1:] == kind[:-1]
        same &= (kind[1:] == Kind.ZERO) | (
            (kind[1:] == Kind.DATA) & (host[1:] == host[:-1] + lengths[:-1])
        )
        keep = np.append(True, ~same)
        stop = starts[-1] + lengths[-1]
        starts = starts[keep]
        kind = kind[keep]
        return Columns(
            starts,
            np.diff(np.append(starts, stop)),
            kind,
            host[keep],
            np.where(kind == Kind.ENCODED, stored[keep], 0),
            (kind == Kind.ZERO).astype(np.uint8),
            (self.file, None),
        )

    def info(self) -> NodeInfo:
        actual_size = self.file.info().actual_size
        return NodeInfo(self.disk.filename, "dmg", self.size, actual_size, dirty=None)


def read_trailer(file: Node) -> tuple[Trailer, int]:
    """The trailer and where it is. Raises ImageCorrupt."""
    start = max(file.size - _TAIL, 0)
    tail = file.read(start, file.size - start)
    at = find_trailer(tail)
    return parse_trailer(tail[at : at + TRAILER_SIZE], start + at), start + at
