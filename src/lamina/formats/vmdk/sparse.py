"""Hosted sparse extents: a directory of tables of grains, with a redundant copy of both.

Data is written before the entry that names it (the flush in front of TABLES), a new table before
its directory entry. Both copies of an entry are written by the same stage: whoever finds them
different after a crash may take either, since both what is there and what is not is true.
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property

from lamina.engine.mapping import Piece
from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt, LaminaError, Refused, StorageError
from lamina.formats.vmdk import layout
from lamina.formats.vmdk.allocation import Space, VmdkReservation
from lamina.formats.vmdk.extents import ZERO_GRAIN, Entries, GrainExtent
from lamina.formats.vmdk.layout import ENTRY_SIZE, SparseHeader
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_down, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node

_ENTRY = struct.Struct("<I")
TABLE_CACHE = 4 << 20
"""Bytes of grain tables that one extent keeps."""
DIRECTORY_CHUNK = 64 << 10
"""Bytes of a directory that are kept as one block."""


class SparseExtent(GrainExtent):
    codec = "grain"
    sealed = False
    """The footer names the directory, in a form that is none of a stream."""

    def __init__(
        self,
        start: int,
        node: Node,
        header: SparseHeader,
        metadata: Metadata,
        *,
        format: str,
        writable: bool,
        backed: bool,
    ) -> None:
        """``backed``: there is something below, which grains that are not here show."""
        super().__init__(
            start, header.capacity, node, header.grain, format=format, writable=writable
        )
        self.header = header
        self.metadata = metadata
        self.backed = backed
        self.compressed = header.compressed
        self.space = Space(self._first_free(), node.size)
        self.check_directory()

    def _first_free(self) -> int:
        end = max(self.node.size, self.header.overhead)
        return round_up(end, SECTOR if self.header.compressed else self.header.grain)

    def check_directory(self) -> None:
        """Raises ImageCorrupt unless the whole directory lies in the file."""
        header = self.header
        end = header.directory_offset + header.directory_entries * ENTRY_SIZE
        if header.directory_offset < SECTOR or end > self.file_end:
            raise ImageCorrupt(
                "Grain directory lies outside of the image",
                path=self.node.filename,
                format="vmdk",
                structure="header",
                field="gdOffset",
                offset=layout.DIRECTORY_FIELD,
            )

    def check_writable(self) -> None:
        if self.header.version == 3 and not self.compressed:
            raise Refused("VMDK version 3 must be read only", errno=errno.EACCES)
        if self.sealed:
            raise Refused("Images with a footer and two directories are only read")

    # -- tables ----------------------------------------------------------------------------------

    @cached_property
    def tables(self) -> TableCache:
        return self._cache(self.header.table_bytes, TABLE_CACHE, Stage.TABLES, "grain tables")

    @cached_property
    def copies(self) -> TableCache:
        """The redundant tables: only looked at when they are written."""
        return self._cache(self.header.table_bytes, TABLE_CACHE, Stage.TABLES, "")

    @cached_property
    def directory(self) -> TableCache:
        return self._cache(DIRECTORY_CHUNK, 4 * DIRECTORY_CHUNK, Stage.ROOTS, "grain directory")

    def _cache(self, table_bytes: int, capacity: int, stage: Stage, name: str) -> TableCache:
        return TableCache(
            self.metadata,
            table_bytes=table_bytes,
            capacity=capacity,
            stage=stage,
            name=name,
            node=self.node,
        )

    def _directory_place(self, base: int, number: int) -> tuple[int, int, int]:
        """Of an entry of the directory at ``base``: host offset of its chunk, the length of that,
        the place in it."""
        at = number * ENTRY_SIZE
        start = round_down(at, DIRECTORY_CHUNK)
        end = self.header.directory_entries * ENTRY_SIZE
        return base + start, min(DIRECTORY_CHUNK, end - start), at - start

    def table_offset(self, number: int) -> int:
        """Host offset of a grain table; 0: there is none. Raises ImageCorrupt."""
        if number >= self.header.directory_entries:
            return 0
        return self._table_offset(self.header.directory_offset, number)

    def _table_offset(self, base: int, number: int) -> int:
        chunk, length, at = self._directory_place(base, number)
        offset: int = SECTOR * _ENTRY.unpack_from(self.directory.get(chunk, length), at)[0]
        if offset and offset + self.header.table_bytes > self.table_limit:
            raise self.misplaced_table(offset, number, chunk + at)
        return offset

    @property
    def table_limit(self) -> int:
        """Tables lie in front of this."""
        return max(round_up(self.file_end, SECTOR), self.space.end)

    def copy_offset(self, number: int) -> int:
        """Host offset of the redundant copy of a table; 0 if there is none that is any good."""
        if not self.has_redundant_directory:
            return 0
        try:
            return self._table_offset(self.header.redundant_offset, number)
        except ImageCorrupt:
            return 0

    @property
    def has_redundant_directory(self) -> bool:
        """There is a second directory, and it lies in the file."""
        header = self.header
        end = header.redundant_offset + header.directory_entries * ENTRY_SIZE
        return header.has_redundant and end <= self.table_limit

    def table(self, number: int) -> bytearray | None:
        offset = self.table_offset(number)
        return self.tables.get(offset) if offset else None

    def entries(self, first: int, count: int) -> Iterator[tuple[int, int, Entries | None]]:
        per_table = self.header.table_entries
        if count > per_table:
            self._prefetch(first // per_table, (first + count - 1) // per_table + 1)
        while count:
            number, index = divmod(first, per_table)
            run = min(count, per_table - index)
            table = self.table(number)
            if table is None:
                yield first, run, None
            else:
                yield first, run, _words(table, index, run)
            first += run
            count -= run

    def _prefetch(self, first: int, last: int) -> None:
        most = TABLE_CACHE // self.header.table_bytes // 2
        offsets = [self.table_offset(number) for number in range(first, min(last, first + most))]
        self.tables.prefetch(offset for offset in offsets if offset)

    def entries_array(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Tables that are not cached are read past the cache, all at once."""
        import numpy as np

        per_table = self.header.table_entries
        low = first // per_table
        high = -(-(first + count) // per_table)
        found = np.zeros((high - low, per_table), "<u4")
        reads = []
        for row, number in zip(found, range(low, high), strict=True):
            table = self.cached_table(number)
            if table is not None:
                row[:] = np.frombuffer(table, "<u4")
            elif offset := self.table_offset(number):
                reads.append((offset, row.data.cast("B")))
        if reads:
            self.node.readv(reads)
        skip = first - low * per_table
        return found.reshape(-1)[skip : skip + count].astype(np.int64)

    def cached_table(self, number: int) -> bytearray | None:
        offset = self.table_offset(number)
        return self.tables.find(offset) if offset else None

    def locate(self, offset: int, length: int) -> int:
        """Host offset of a few bytes of one plain grain whose table is at hand; else -1."""
        number, skip = divmod(offset - self.start, self.grain)
        if skip + length > self.grain:
            return -1
        table_number, index = divmod(number, self.header.table_entries)
        table = self.cached_table(table_number)
        if table is None:
            return -1
        place: int = SECTOR * _ENTRY.unpack_from(table, ENTRY_SIZE * index)[0]
        return place + skip if SECTOR < place < self.file_end else -1

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, offset: int, length: int, reservation: VmdkReservation) -> None:
        if not self.writable or self.compressed:
            raise self.refusal()
        grain, end = self.grain, offset + length
        first = (offset - self.start) // grain
        last = -(-(end - self.start) // grain)
        for number, count, sectors in self.entries(first, last - first):
            self.need_table(number // self.header.table_entries)
            self._hold(number, count)
            for index in range(count):
                start = self.start + (number + index) * grain
                low, high = max(start, offset), min(start + grain, end)
                sector = 0 if sectors is None else sectors[index]
                if sector > ZERO_GRAIN:
                    place = self.place(start, sector) + low - start
                    reservation.add(Piece(low, high - low, self.node, place))
                    continue
                place, untouched = self.space.take(grain)
                reservation.took(self, number + index, place)
                reservation.add(
                    Piece(
                        low,
                        high - low,
                        self.node,
                        place + low - start,
                        copy_head=low - start,
                        copy_tail=self._grain_end(start) - high,
                        fresh=True,
                        reads_zero=untouched,
                    )
                )

    def _grain_end(self, start: int) -> int:
        """Where the grain ends that begins here: behind an extent there may be another one."""
        end = start + self.grain
        return end if self.is_last else min(end, self.end)

    def reserve_encoded(self, offset: int, length: int, reservation: VmdkReservation) -> None:
        """A place for a compressed grain with its marker. Raises StorageError (EIO) if there is one
        already: they are written once."""
        number = (offset - self.start) // self.grain
        self.need_table(number // self.header.table_entries)
        (_, _, sectors), *_ = self.entries(number, 1)
        if sectors is not None and sectors[0]:
            raise StorageError("Input/output error", structure="allocated grain")
        place = self.space.append(length, SECTOR)
        reservation.took(self, number, place)
        reservation.pieces.append(Piece(offset, length, self.node, place, fresh=True))

    def need_table(self, number: int) -> None:
        """See to it that there is a table. Its space is not given back if the write fails."""
        if self.table_offset(number):
            return
        header = self.header
        size = round_up(header.table_bytes, SECTOR)
        place = self.space.append(2 * size, SECTOR if self.compressed else self.grain)
        self.tables.new(place, at_once=True)
        if self.has_redundant_directory:
            self.copies.new(place + size, at_once=True)
            self.name_table(header.redundant_offset, number, place + size)
        self.name_table(header.directory_offset, number, place)

    def _hold(self, first: int, count: int) -> None:
        """Have room for the entries of these grains of one table that there is."""
        number, index = divmod(first, self.header.table_entries)
        self.table(number)
        where = ENTRY_SIZE * index, ENTRY_SIZE * count
        self.tables.hold(self.table_offset(number), *where)
        if copy := self.copy_offset(number):
            self.copies.hold(copy, *where)

    def name_table(self, base: int, number: int, place: int) -> None:
        """In the directory at ``base``."""
        chunk, length, at = self._directory_place(base, number)
        self.directory.get(chunk, length)
        self.directory.hold(chunk, at, ENTRY_SIZE)
        self.directory.update(chunk, at, _ENTRY.pack(place // SECTOR))

    def hold_tables(self, numbers: Sequence[int]) -> None:
        """Have the tables of these grains at hand, so that changing them cannot fail."""
        for number in dict.fromkeys(grain // self.header.table_entries for grain in numbers):
            self.table(number)
            if copy := self.copy_offset(number):
                self.copies.get(copy)

    def publish(self, grains: Sequence[tuple[int, int]]) -> None:
        """Let entries name new places: (number of the grain, host offset)."""
        for number, host_offset in grains:
            self.set_entries(number, [host_offset // SECTOR])
            self.file_end = max(self.file_end, host_offset + self.grain)
        self.space.touched = max(self.space.touched, self.space.end)

    def set_entries(self, first: int, sectors: Sequence[int]) -> None:
        """Of grains of one table that there is."""
        number, index = divmod(first, self.header.table_entries)
        data = struct.pack(f"<{len(sectors)}I", *sectors)
        self.tables.update(self.table_offset(number), ENTRY_SIZE * index, data)
        if copy := self.copy_offset(number):
            self.copies.update(copy, ENTRY_SIZE * index, data)

    def give_back(self, grains: Sequence[tuple[int, int]]) -> None:
        """Grains that were reserved and not published, the latest last."""
        if self.compressed:
            return
        for _, host_offset in reversed(grains):
            self.space.give_back(host_offset, self.grain)

    def finish(self) -> None:
        """Freed grains at the end of the file are no use to anybody."""
        end = self.space.end
        self.metadata.commit()
        if end < self.node.size and not self.compressed:
            self.metadata.barrier()
            self.node.truncate(end)

    # -- zeroes ----------------------------------------------------------------------------------

    def zero(self, offset: int, length: int) -> bool:
        if self.compressed or not self.writable:
            return not self.backed and not any(
                sectors and any(sectors) for _, _, sectors in self._covered(offset, length)
            )
        if self.header.zeroed_grains:
            self._clear(offset, length, ZERO_GRAIN)
            return True
        if self.backed:
            return False
        self._clear(offset, length, 0)
        return True

    def discard(self, offset: int, length: int) -> None:
        if self.compressed or not self.writable:
            return
        if not self.backed:
            self._clear(offset, length, 0)
        elif self.header.zeroed_grains:
            # Without an entry of its own it would show again what is below.
            self._clear(offset, length, ZERO_GRAIN)

    def forget(self, offset: int, length: int) -> None:
        """Whole grains are no part of the disk any more."""
        self._clear(offset, length, 0)

    def _covered(self, offset: int, length: int) -> Iterator[tuple[int, int, Entries | None]]:
        first = (offset - self.start) // self.grain
        last = -(-(offset + length - self.start) // self.grain)
        return self.entries(first, last - first)

    def _clear(self, offset: int, length: int, entry: int) -> None:
        """Give these entries another meaning, and free what they named."""
        for number, count, sectors in self._covered(offset, length):
            if sectors is None:
                if not entry:
                    continue
                self.need_table(number // self.header.table_entries)
            elif all(sector == entry for sector in sectors):
                continue
            if entry:
                self._hold(number, count)
            self.set_entries(number, [entry] * count)
            self._free(
                self.place(self.start + (number + index) * self.grain, sector)
                for index, sector in enumerate(sectors or ())
                if sector > ZERO_GRAIN
            )

    def _free(self, places: Iterator[int]) -> None:
        freed = list(places)
        if freed:
            self.metadata.when_durable(lambda: self._forget(freed))

    def _forget(self, places: list[int]) -> None:
        """Nobody can find these grains any more."""
        for place in places:
            with suppress(LaminaError):
                self.node.discard(place, self.grain)
            self.space.give_back(place, self.grain)


def _words(table: bytearray, index: int, count: int) -> array[int]:
    found = array("I", bytes(memoryview(table)[ENTRY_SIZE * index : ENTRY_SIZE * (index + count)]))
    if sys.byteorder == "big":
        found.byteswap()
    return found
