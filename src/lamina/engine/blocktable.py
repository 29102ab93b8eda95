"""Block allocation tables: one entry for each block of the disk, which says where the block is.

VDI, VHD and their like have a single level of tables. The table is a run of numbers in the file;
it is loaded in chunks, when they are needed, and written back in parts, as they change. A mapping
built on ``BlockMapping`` says what its entries mean, where blocks may lie and what a new one takes;
everything that is the same for all of them is here.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.engine.coalescing import columns_of_units, extents_of_units
from lamina.engine.mapping import Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node, WriteRequest
    from lamina.engine.appending import Appender

CHUNK = 1 << 20
"""Bytes of a table that are loaded at once: a huge, sparse one is not loaded as a whole."""
CHUNKS = 16
"""So many are kept while they are clean."""
FEW = 1 << 20
"""Entries that are looked at without numpy, which takes a while to load."""


class BlockTable:
    """The entries as they are stored: numbers, native to whoever asks."""

    def __init__(
        self,
        metadata: Metadata,
        *,
        host_offset: int,
        entries: int,
        code: str = "I",
        byteorder: str = "little",
        stage: Stage = Stage.TABLES,
        name: str = "block allocation table",
        node: Node | None = None,
    ) -> None:
        """``code``: of ``array`` and ``struct``, I or Q; ``node``: what the table is in, unless in
        the file of ``metadata``. The caller has validated the rest."""
        self.host_offset = host_offset
        self.entries = entries
        self.code = code
        self.entry_bytes = 4 if code == "I" else 8
        self.byteorder: Any = byteorder
        self._swapped = byteorder != sys.byteorder
        self._chunks = TableCache(
            metadata,
            table_bytes=min(CHUNK, max(entries * self.entry_bytes, 1)),
            capacity=CHUNKS * CHUNK,
            stage=stage,
            name=name,
            node=node,
        )

    def resize(self, entries: int) -> None:
        """The table in the file is longer now, or shorter. Nothing of it is dirty."""
        self._chunks.drop_clean()
        self.entries = entries

    def _chunk(self, at: int) -> tuple[int, bytearray]:
        """Where the chunk that holds byte ``at`` of the table begins in it, and the chunk."""
        start = at // CHUNK * CHUNK
        offset = self.host_offset + start
        found = self._chunks.find(offset)
        if found is None:
            length = min(CHUNK, self.entries * self.entry_bytes - start)
            found = self._chunks.get(offset, length)
        return start, found

    def __getitem__(self, index: int) -> int:
        at = index * self.entry_bytes
        start, chunk = self._chunk(at)
        at -= start
        return int.from_bytes(chunk[at : at + self.entry_bytes], self.byteorder)

    def __setitem__(self, index: int, entry: int) -> None:
        at = index * self.entry_bytes
        start, _ = self._chunk(at)
        data = entry.to_bytes(self.entry_bytes, self.byteorder)
        self._chunks.update(self.host_offset + start, at - start, data)

    def hold(self, index: int) -> None:
        """See to it that the file has room for an entry that is about to be set."""
        at = index * self.entry_bytes
        start, _ = self._chunk(at)
        self._chunks.hold(self.host_offset + start, at - start, self.entry_bytes)

    def runs(self, first: int, count: int) -> Iterator[tuple[int, array[int]]]:
        """(index of the first, entries) for ``count`` entries from ``first``, chunk by chunk."""
        for index, data in self._bytes(first, count):
            entries = array(self.code, data)
            if self._swapped:
                entries.byteswap()
            yield index, entries

    def columns(self, first: int, count: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The same as numpy arrays. 64-bit entries must be less than 2^63."""
        import numpy as np

        kind = np.dtype("u4" if self.entry_bytes == 4 else "i8").newbyteorder(
            "<" if self.byteorder == "little" else ">"
        )
        for index, data in self._bytes(first, count):
            yield index, np.frombuffer(data, dtype=kind).astype(np.int64)

    def highest(self, special: Collection[int]) -> int:
        """The largest entry but for those in ``special``; -1: there is no other."""
        found = -1
        if self.entries <= FEW:
            for _, run in self.runs(0, self.entries):
                found = max(found, max(set(run).difference(special), default=-1))
            return found
        for _, column in self.columns(0, self.entries):
            for value in special:
                column = column[column != value]
            found = max(found, int(column.max(initial=-1)))
        return found

    def _bytes(self, first: int, count: int) -> Iterator[tuple[int, bytearray]]:
        at, end = first * self.entry_bytes, (first + count) * self.entry_bytes
        while at < end:
            start, chunk = self._chunk(at)
            stop = min(end, start + CHUNK)
            yield at // self.entry_bytes, chunk[at - start : stop - start]
            at = stop


class BlockMapping(Mapping):
    """A mapping of blocks of ``unit`` bytes that one table names.

    An entry that is a key of ``special`` stands for a block that is not there, and its value says
    what the block reads as, ZERO or BELOW. Every other one is a number ``n`` that puts the data of
    its block at host offset ``base + n * scale``.
    """

    special: dict[int, Kind]
    zero_entry: int | None = None
    """What to write over BELOW to have a block read as zeroes; None: the format cannot say it."""
    file: Node
    table: BlockTable
    appender: Appender
    base: int
    scale: int
    block_bytes: int
    """Host bytes of a block: of its data and of what stands before."""
    prefix: int = 0
    """Host bytes of a block that stand before its data."""
    block_alignment: int = 1
    """Of a new block in the file."""
    has_backing = False

    @abstractmethod
    def check_places(self, block: int, lowest: int, highest: int) -> None:
        """Raises ImageCorrupt where no data of a block can be.

        ``lowest`` and ``highest`` are host offsets of data, ``block`` the first with such an entry.
        """

    def added(self, block: int, host_offset: int) -> None:
        """A block was appended and its entry set: what else the format has to say about it."""

    # -- reading ---------------------------------------------------------------------------------

    def place(self, block: int) -> int:
        """Host offset of the data of a block; -1: it is not there."""
        entry = self.table[block]
        if entry in self.special:
            return -1
        place = self.base + entry * self.scale
        self.check_places(block, place, place)
        return place

    def resolve(self, offset: int, length: int) -> list[Extent]:
        return extents_of_units(offset, offset + length, self._units(offset, length), self.file)

    def _units(self, offset: int, length: int) -> Iterator[tuple[int, Kind, int]]:
        unit, base, scale, special = self.unit, self.base, self.scale, self.special
        first = offset // unit
        for index, entries in self.table.runs(first, -(-(offset + length) // unit) - first):
            for block, entry in enumerate(entries, index):
                kind = special.get(entry)
                if kind is not None:
                    yield block * unit, kind, -1
                    continue
                place = base + entry * scale
                self.check_places(block, place, place)
                yield block * unit, Kind.DATA, place

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        import numpy as np

        unit = self.unit
        end = offset + length
        first = offset // unit
        for index, entries in self.table.columns(first, -(-end // unit) - first):
            kind = np.full(len(entries), Kind.DATA, dtype=np.uint8)
            for value, what in self.special.items():
                kind[entries == value] = what
            here = kind == Kind.DATA
            host = np.where(here, self.base + entries * self.scale, -1)
            if here.any():
                block = index + int(here.argmax())
                self.check_places(block, int(host[here].min()), int(host[here].max()))
            start, stop = index * unit, min((index + len(entries)) * unit, end)
            yield columns_of_units(max(offset, start), stop, start, unit, kind, host, self.file)

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        return [self._spot(offset, len(buffer)) for offset, buffer in requests]

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        return [self._spot(offset, len(data)) for offset, data in requests]

    def _spot(self, offset: int, length: int) -> int:
        """Host offset of a range inside of one block that is there, or -1."""
        block, skip = divmod(offset, self.unit)
        if not 0 < length <= self.unit - skip:
            return -1
        place = self.place(block)
        return place if place < 0 else place + skip

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        reservation = self.reservation()
        try:
            for offset, length in ranges:
                self._reserve_range(reservation, offset, offset + length)
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def reservation(self) -> BlockReservation:
        return BlockReservation(self)

    def _reserve_range(self, reservation: BlockReservation, offset: int, end: int) -> None:
        unit = self.unit
        while offset < end:
            block, skip = divmod(offset, unit)
            stop = min(end, offset - skip + unit)
            place = self.place(block)
            if place < 0:
                reservation.append(block, offset, stop)
            else:
                reservation.within(place + skip, offset, stop)
            offset = stop

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """What is not there becomes zero by its entry, if the format has one; the engine does the
        rest."""
        done = True
        for extent in self.resolve(offset, length):
            if extent.kind is Kind.DATA:
                done = False
            elif extent.kind is Kind.BELOW and self.has_backing:
                if self.zero_entry is None:
                    done = False
                    continue
                for block in range(extent.guest_offset // self.unit, -(-extent.end // self.unit)):
                    self.table[block] = self.zero_entry
        return done

    def discard(self, offset: int, length: int) -> None:
        """Tables of this kind know no free space: blocks stay, without their storage."""
        for extent in self.resolve(offset, length):
            if extent.kind is Kind.DATA:
                self.file.discard(extent.host_offset, extent.length)


class BlockReservation(Reservation):
    """Blocks at the end of the file that no entry names yet."""

    def __init__(self, mapping: BlockMapping) -> None:
        self.pieces: list[Piece] = []
        self._mapping = mapping
        self._start = self._end = mapping.appender.end
        self._new: list[tuple[int, int]] = []

    def within(self, place: int, start: int, end: int) -> None:
        """The guest writes from ``start`` to ``end`` to a block that is there. ``place``: of
        ``start`` in the file."""
        self.pieces.append(Piece(start, end - start, self._mapping.file, place))

    def append(self, block: int, start: int, end: int) -> None:
        """A new block, of which the guest writes from ``start`` to ``end``. Raises StorageError."""
        mapping = self._mapping
        first = block * mapping.unit
        place, untouched = self.take(block)
        piece = Piece(
            start,
            end - start,
            mapping.file,
            place + start - first,
            copy_head=start - first,
            copy_tail=first + mapping.unit - end,
            fresh=True,
            reads_zero=untouched,
        )
        self.pieces.append(piece)

    def take(self, block: int) -> tuple[int, bool]:
        """Host offset of the data of a new block, and whether it reads as zeroes for certain."""
        mapping = self._mapping
        mapping.table.hold(block)
        offset, untouched = mapping.appender.take(
            mapping.block_bytes, mapping.block_alignment, prefix=mapping.prefix
        )
        self._end = mapping.appender.end
        self._new.append((block, offset + mapping.prefix))
        return offset + mapping.prefix, untouched

    def commit(self) -> None:
        mapping = self._mapping
        if self._new:
            try:
                mapping.appender.reach(self._end)
            except BaseException:
                self.abort()
                raise
        for block, place in self._new:
            mapping.table[block] = (place - mapping.base) // mapping.scale
            mapping.added(block, place)

    def abort(self) -> None:
        self._mapping.appender.give_back(self._start, self._end)
