"""A small but complete format: the engine's guinea pig, and a model for authors of formats.

Everything is a block of ``unit`` bytes. All numbers are little-endian.

    block 0        header: magic "lamina\\0\\1", size u64, unit u32, blocks of counts u32,
                   entries of the root u32
    then           counts: one byte per block of the file, how many name it
    then           the root: u64 offsets of tables, 0 where there is none
    anywhere       tables of unit / 8 entries u64, units of data

An entry is the offset of a block, with the low bits saying what it holds: nothing set: data; 1: the
unit reads as zeroes, and the offset (if any) is space kept for it; 2: the unit is compressed.
0 alone means: see the backing file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.block.node import Node, NodeOptions, WriteRequest
from lamina.engine.disk import Disk
from lamina.engine.mapping import Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt, StorageError
from lamina.hints import ClassVar
from lamina.testing.context import NodesContext
from lamina.units import round_up

_MAGIC = b"lamina\0\1"
_HEADER = struct.Struct("<8sQIII")
_ENTRY = struct.Struct("<Q")
_ZERO = 1
_ENCODED = 2
_FLAGS = 511


def create(file: Node, size: int, unit: int = 4096, *, blocks: int = 0) -> None:
    """Make ``file`` an empty image. ``blocks``: how many the file may ever have."""
    entries = unit // 8
    tables = -(-size // (unit * entries))
    wanted = blocks or 2 * (-(-size // unit) + tables) + 64
    counts = -(-wanted // unit)
    root = max(-(-tables * 8 // unit), 1)
    used = 1 + counts + root
    header = _HEADER.pack(_MAGIC, size, unit, counts, tables)
    image = header.ljust(unit, b"\0") + (b"\1" * used).ljust(counts * unit, b"\0")
    file.write(0, image + bytes(root * unit))


class SampleMapping(Mapping):
    driver: ClassVar[str] = "sample"
    codec = "zlib"

    def __init__(self, disk: Disk, *, cache: int = 1 << 16, limit: int = 1 << 16) -> None:
        self.file = self.data_node = disk.file
        header: tuple[bytes, int, int, int, int]
        header = _HEADER.unpack(disk.file.read(0, _HEADER.size))
        magic, self.size, self.unit, self._count_blocks, tables = header
        if magic != _MAGIC or self.unit < 512 or self.unit & (self.unit - 1):
            raise ImageCorrupt("Image not in sample format", format="sample", structure="header")
        self.encoded_unit = self.unit
        self._entries = self.unit // 8
        self._root_offset = (1 + self._count_blocks) * self.unit
        root = disk.file.read(self._root_offset, tables * 8)
        self._root = list(struct.unpack(f"<{tables}Q", root))
        self.metadata = Metadata(disk.file, limit=limit)
        self.tables = TableCache(
            self.metadata,
            table_bytes=self.unit,
            capacity=cache,
            stage=Stage.TABLES,
            name="table cache",
            load_event="l2_load",
            store_event="l2_update",
        )
        self.counts = TableCache(
            self.metadata,
            table_bytes=self.unit,
            capacity=cache,
            stage=Stage.COUNTS,
            name="count cache",
        )
        self._next_free = 0
        self._has_backing = False
        backing = disk.context.open_named("backing", "", driver=None, relative_to=disk)
        if backing is not None:
            disk.attach("backing", backing)
            self._has_backing = True

    # -- counts ----------------------------------------------------------------------------------

    def _count(self, block: int) -> tuple[int, bytearray, int]:
        """Where the count of a block is: the table's offset, the table, the index in it."""
        offset = (1 + block // self.unit) * self.unit
        return offset, self.counts.get(offset), block % self.unit

    def allocate(self) -> int:
        """Offset of a block that nobody uses. Raises StorageError (ENOSPC)."""
        total = self._count_blocks * self.unit
        for step in range(total):
            block = (self._next_free + step) % total
            offset, table, index = self._count(block)
            if not table[index]:
                table[index] = 1
                self.counts.dirty(offset, index, 1)
                self._next_free = block + 1
                return block * self.unit
        raise StorageError.from_errno(28)

    def give_back(self, host_offset: int) -> None:
        """At once: only for blocks that nobody on storage or in flight knows."""
        offset, table, index = self._count(host_offset // self.unit)
        if not table[index]:
            raise ImageCorrupt("block freed twice", format="sample", offset=host_offset)
        table[index] -= 1
        self.counts.dirty(offset, index, 1, Stage.FREES)
        self._next_free = min(self._next_free, host_offset // self.unit)

    def free(self, host_offset: int) -> None:
        """When its last name is gone from storage too."""
        self.metadata.when_durable(lambda: self.give_back(host_offset))

    # -- tables ----------------------------------------------------------------------------------

    def _table(self, unit: int) -> bytearray | None:
        number = unit // self._entries
        if number >= len(self._root) or not self._root[number]:
            return None
        if self._root[number] % self.unit:
            raise ImageCorrupt("Table is not aligned", format="sample", structure="root")
        return self.tables.get(self._root[number])

    def entry(self, unit: int) -> int:
        table = self._table(unit)
        if table is None:
            return 0
        found = int(_ENTRY.unpack_from(table, unit % self._entries * 8)[0])
        if found & _FLAGS > _ENCODED:
            raise ImageCorrupt("Reserved bits are set", format="sample", structure="table")
        return found

    def need_table(self, unit: int) -> None:
        """Before changing entries. Raises StorageError with nothing changed."""
        if self._table(unit) is None:
            number = unit // self._entries
            place = self.allocate()
            self.tables.new(place)
            self._root[number] = place
            self.metadata.put(
                Stage.ROOTS,
                self._root_offset + number * 8,
                _ENTRY.pack(place),
                event="l1_update",
            )

    def set_entry(self, unit: int, entry: int) -> None:
        """The old block, if it is another one, becomes free."""
        old = self.entry(unit)
        index = unit % self._entries * 8
        table = self._table(unit)
        assert table is not None
        _ENTRY.pack_into(table, index, entry)
        self.tables.dirty(self._root[unit // self._entries], index, 8)
        if old & ~_FLAGS and old & ~_FLAGS != entry & ~_FLAGS:
            self.free(old & ~_FLAGS)

    # -- the contract ----------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            unit = offset // self.unit
            skip = offset % self.unit
            size = min(end, (unit + 1) * self.unit) - offset
            extents.append(self._extent(offset, size, skip, self.entry(unit)))
            offset += size
        return _coalesced(extents)

    def _extent(self, offset: int, size: int, skip: int, entry: int) -> Extent:
        host = entry & ~_FLAGS
        if entry & _ENCODED:
            return Extent(
                offset,
                size,
                Kind.ENCODED,
                self.file,
                host,
                stored_length=self.unit,
                codec=self.codec,
                unit_offset=offset - skip,
                unit_length=self.unit,
            )
        if entry & _ZERO:
            return Extent(offset, size, Kind.ZERO, self.file, host + skip if host else -1)
        if not entry:
            return Extent(offset, size, Kind.BELOW)
        return Extent(offset, size, Kind.DATA, self.file, host + skip)

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int]:
        return [self._place(offset, len(buffer)) for offset, buffer in requests]

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int]:
        return [self._place(offset, len(data)) for offset, data in requests]

    def _place(self, offset: int, length: int) -> int:
        if offset // self.unit != (offset + length - 1) // self.unit:
            return -1
        entry = self.entry(offset // self.unit)
        return entry + offset % self.unit if entry and not entry & _FLAGS else -1

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        reservation = SampleReservation(self)
        try:
            for offset, length in ranges:
                reservation.add(offset, length)
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def reserve_encoded(self, units: Sequence[tuple[int, int]]) -> Reservation:
        reservation = SampleReservation(self, _ENCODED)
        try:
            for offset, length in units:
                self.need_table(offset // self.unit)
                place = reservation.take(offset // self.unit)
                reservation.pieces.append(Piece(offset, length, self.file, place, fresh=True))
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        for unit in range(offset // self.unit, (offset + length) // self.unit):
            old = self.entry(unit)
            if not old and not self._has_backing:
                continue
            self.need_table(unit)
            kept = 0 if may_unmap or old & _ENCODED else old & ~_FLAGS
            self.set_entry(unit, kept | _ZERO)
        return True

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, may_unmap=True)

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        room = len(self._root) * self._entries * self.unit
        if size > room:
            raise StorageError.from_errno(27)
        if size < self.size:
            edge = round_up(size, self.unit)
            self.discard(edge, round_up(self.size, self.unit) - edge)
        self.size = size
        self.metadata.put(Stage.ROOTS, 8, _ENTRY.pack(size))

    def info(self) -> NodeInfo:
        return NodeInfo(self.file.filename, self.driver, self.size, cluster_size=self.unit)


class SampleReservation(Reservation):
    def __init__(self, mapping: SampleMapping, flags: int = 0) -> None:
        self.pieces: list[Piece] = []
        self._mapping = mapping
        self._flags = flags
        self._new: list[tuple[int, int]] = []
        """Unit and the block for it."""
        self._zero_kept: list[tuple[int, int]] = []

    def take(self, unit: int) -> int:
        place = self._mapping.allocate()
        self._new.append((unit, place))
        return place

    def add(self, offset: int, length: int) -> None:
        mapping = self._mapping
        size = mapping.unit
        end = offset + length
        while offset < end:
            unit = offset // size
            stop = min(end, (unit + 1) * size)
            skip = offset % size
            entry = mapping.entry(unit)
            if entry and not entry & _FLAGS:
                self.pieces.append(Piece(offset, stop - offset, mapping.file, entry + skip))
            else:
                mapping.need_table(unit)
                if entry & _ZERO and entry & ~_FLAGS:
                    place = entry & ~_FLAGS
                    self._zero_kept.append((unit, place))
                else:
                    place = self.take(unit)
                self.pieces.append(
                    Piece(
                        offset,
                        stop - offset,
                        mapping.file,
                        place + skip,
                        copy_head=skip,
                        copy_tail=(unit + 1) * size - stop,
                        fresh=True,
                    )
                )
            offset = stop

    def commit(self) -> None:
        for unit, place in (*self._new, *self._zero_kept):
            self._mapping.set_entry(unit, place | self._flags)

    def abort(self) -> None:
        for _, place in self._new:
            self._mapping.give_back(place)


def _coalesced(extents: list[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for extent in extents:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.kind == extent.kind != Kind.ENCODED
            and (
                last.host_offset + last.length == extent.host_offset
                or last.host_offset == extent.host_offset == -1
            )
        ):
            joined[-1] = last._replace(length=last.length + extent.length)
        else:
            joined.append(extent)
    return joined


def check(file: Node) -> tuple[int, list[str]]:
    """Blocks leaked, and errors: blocks named more often than they are counted."""
    unit, count_blocks, tables = _HEADER.unpack(file.read(0, _HEADER.size))[2:]
    counts = file.read(unit, count_blocks * unit)
    named = [0] * len(counts)
    for block in range(1 + count_blocks + max(-(-tables * 8 // unit), 1)):
        named[block] += 1
    errors: list[str] = []

    def name(offset: int, what: str) -> bool:
        if offset % unit or offset // unit >= len(counts):
            errors.append(f"{what} at {offset}")
            return False
        named[offset // unit] += 1
        return True

    root = file.read((1 + count_blocks) * unit, tables * 8)
    for (table,) in _ENTRY.iter_unpack(root):
        if table and name(table, "table"):
            for (entry,) in _ENTRY.iter_unpack(file.read(table, unit)):
                if entry & ~_FLAGS:
                    name(entry & ~_FLAGS, "unit")
    errors += [
        f"block {block}: counted {counted}, named {uses}"
        for block, (counted, uses) in enumerate(zip(counts, named, strict=True))
        if uses > counted or uses > 1
    ]
    leaks = sum(counted > uses for counted, uses in zip(counts, named, strict=True))
    return leaks, errors


def open_disk(
    file: Node, *, backing: Node | None = None, options: NodeOptions | None = None
) -> Disk:
    """A disk on ``file``; its warnings are in ``disk.context.warnings``."""
    return Disk(NodesContext(file, backing=backing, node_options=options), SampleMapping)
