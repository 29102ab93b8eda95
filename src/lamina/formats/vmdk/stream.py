"""Stream-optimized extents in the form that is written in one pass.

    header (whose directory is "at the end"), descriptor
    for each table: its compressed grains, each behind its marker, then the table behind its own
    the directory, the footer (a header that knows the directory), the end of the stream

While such an extent is being written, its directory is in the unused space in front of the first
grain, and the header says so: what was flushed is found whatever happens. Grains go where the
directory at the end was. Closing writes a new end and lets the header refer to it again; an image
that was not closed is whole, but no stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property

from lamina.engine.metadata import Stage
from lamina.errors import StorageError
from lamina.formats.vmdk.layout import (
    AT_END,
    DIRECTORY_FIELD,
    ENTRY_SIZE,
    MARKER_DIRECTORY,
    MARKER_END,
    MARKER_FOOTER,
    MARKER_TABLE,
    TRAILER_SIZE,
    SparseHeader,
    pack_marker,
    parse_marker,
)
from lamina.formats.vmdk.sparse import DIRECTORY_CHUNK, SparseExtent
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.vmdk.allocation import VmdkReservation

_PLACE = struct.Struct("<Q")
HELD_AHEAD = 1 << 20
"""Bytes of room that are taken at once."""


class StreamExtent(SparseExtent):
    footer = False
    """The header leaves it to the footer to name the directory."""
    _held = 0
    """Host offset of the end of what the file has room for."""

    @cached_property
    def _open(self) -> dict[int, bytearray]:
        """Tables by number that have no place yet: it will be behind their grains."""
        return {}

    # -- tables without a place ------------------------------------------------------------------

    def table(self, number: int) -> bytearray | None:
        return self._open.get(number) or super().table(number)

    def cached_table(self, number: int) -> bytearray | None:
        return self._open.get(number) or super().cached_table(number)

    def need_table(self, number: int) -> None:
        if number in self._open or self.table_offset(number):
            return
        self.place_tables()
        self._open[number] = bytearray(self.header.table_bytes)

    def set_entries(self, first: int, sectors: Sequence[int]) -> None:
        number, index = divmod(first, self.header.table_entries)
        table = self._open.get(number)
        if table is None:
            super().set_entries(first, sectors)
        else:
            struct.pack_into(f"<{len(sectors)}I", table, ENTRY_SIZE * index, *sectors)

    def place_tables(self) -> None:
        """Put the tables that are open behind the grains that are there so far."""
        header = self.header
        for number in list(self._open):
            size = round_up(header.table_bytes, SECTOR)
            place = self.space.append(SECTOR + size, SECTOR)
            self.metadata.put(Stage.TABLES, place, pack_marker(MARKER_TABLE, size), node=self.node)
            place += SECTOR
            self.name_table(header.directory_offset, number, place)
            self.tables.new(place, self._open.pop(number))

    def reserve_encoded(self, offset: int, length: int, reservation: VmdkReservation) -> None:
        before = self.space.end
        super().reserve_encoded(offset, length, reservation)
        self._hold_end(before)

    def _hold_end(self, before: int) -> None:
        """Have room for the tables that have no place yet and for the end of the stream: it shall
        not be too late to say that there is none. Nothing is written behind ``before`` yet."""
        table = SECTOR + round_up(self.header.table_bytes, SECTOR)
        end = self.space.end + len(self._open) * table + SECTOR + self._directory_bytes
        end += TRAILER_SIZE
        start = max(self._held, before)
        if end <= start:
            return
        try:
            self.node.write_zeroes(start, end + HELD_AHEAD - start)
            self._held = end + HELD_AHEAD
        except StorageError:
            # There is no room for more than what is needed.
            self.node.write_zeroes(start, end - start)
            self._held = end

    # -- the end of the stream -------------------------------------------------------------------

    @property
    def _directory_bytes(self) -> int:
        return round_up(self.header.directory_entries * ENTRY_SIZE, SECTOR)

    def begin(self) -> None:
        """Before the first grain is written."""
        if not self.footer:
            return
        header = self.header
        old = header.directory_offset
        spare = spare_directory(header)
        end = old + self._directory_bytes
        if end + TRAILER_SIZE != self.node.size:
            # Who knows what is there.
            end = round_up(self.node.size, SECTOR)
        if spare and self._nothing_before(header.overhead):
            self.node.writev([(spare, self._whole_directory())])
            self.node.flush()
            if end < self.node.size and self._is_directory_marker(old - SECTOR):
                end = old - SECTOR
        else:
            spare = old
        self._point(spare)
        self._use_directory(spare)
        self.footer = False
        self.space.end = end

    def _is_directory_marker(self, offset: int) -> bool:
        if offset < self.header.overhead:
            return False
        marker = parse_marker(self.node.read(offset, SECTOR))
        return (marker.size, marker.kind) == (0, MARKER_DIRECTORY)

    def finish(self) -> None:
        """A new end, once everything is written."""
        if self.footer:
            return
        self.place_tables()
        end = self.space.end
        place = end + SECTOR
        directory = self._whole_directory()
        last = trailer(replace(self.header, directory_offset=place), directory)
        self.metadata.put(Stage.TABLES, end, last, node=self.node)
        self.metadata.commit()
        self.metadata.barrier()
        # Footers are looked for at the end of the file: that is durable before one is.
        self.node.truncate(end + len(last))
        self.metadata.data_written(self.node)
        self._held = 0
        self.metadata.put(Stage.ROOTS, DIRECTORY_FIELD, _PLACE.pack(AT_END), node=self.node)
        self.metadata.commit()
        self.metadata.barrier()
        self._use_directory(place)
        self.footer = True
        self.space.end = self.node.size

    def _nothing_before(self, offset: int) -> bool:
        """No table and no directory lies in front of this."""
        if self.header.directory_offset < offset:
            return False
        directory = memoryview(self._whole_directory()).cast("I")
        # Sectors of 0 name nothing. On a big-endian machine this refuses more than it must.
        return not any(0 < sector < offset // SECTOR for sector in directory)

    def _whole_directory(self) -> bytearray:
        found = bytearray(self._directory_bytes)
        base = self.header.directory_offset
        for number in range(0, self.header.directory_entries, DIRECTORY_CHUNK // ENTRY_SIZE):
            chunk, length, _ = self._directory_place(base, number)
            found[chunk - base : chunk - base + length] = self.directory.get(chunk, length)
        return found

    def _point(self, directory_offset: int) -> None:
        self.node.writev([(DIRECTORY_FIELD, _PLACE.pack(directory_offset // SECTOR))])
        self.node.flush()

    def _use_directory(self, offset: int) -> None:
        self.directory.drop_clean()
        self.header = replace(self.header, directory_offset=offset)


def spare_directory(header: SparseHeader) -> int:
    """Where between descriptor and first grain a directory has room; 0: nowhere."""
    offset = max(round_up(header.descriptor_offset + header.descriptor_size, SECTOR), SECTOR)
    end = offset + header.directory_entries * ENTRY_SIZE
    return offset if end <= header.overhead else 0


def trailer(header: SparseHeader, directory: bytes | bytearray) -> bytes:
    """What a stream ends with; ``header`` knows where this ``directory`` will be."""
    return b"".join(
        (
            pack_marker(MARKER_DIRECTORY, len(directory)),
            directory,
            pack_marker(MARKER_FOOTER, SECTOR),
            header.pack(),
            pack_marker(MARKER_END, 0),
        )
    )
