"""bochs: disks of the Bochs emulator that grow as they are written to. For reading.

``growing`` (a redolog) and ``sparse`` images; ``flat`` ones are raw. Little-endian. What is known
of the headers comes from the images that ``bximage`` makes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from lamina.block.driver import Driver
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.engine.blocktable import BlockTable
from lamina.engine.coalescing import append_extent
from lamina.engine.metadata import Stage
from lamina.engine.read_only import ReadOnlyMapping
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk

NOWHERE = 0xFFFFFFFF
"""What a table says of a place that was never written to."""
HEADER_BYTES = 512

MAGIC = b"Bochs Virtual HD Image"
_REDOLOG = struct.Struct("<32s16s16sII III")
VERSION_1, VERSION_2 = 0x10000, 0x20000
MAX_CATALOG = 0x100000
MAX_EXTENT = 0x800000

SPARSE_MAGIC = 0x02468ACE
_SPARSE = struct.Struct("<IIIIQ")
SPARSE_VERSION = 2
SPARSE_HEADER = 256
MAX_PAGE = 1 << 26
MAX_PAGES = 1 << 28

BITMAP_CACHE = 1 << 20


@dataclass(frozen=True)
class Redolog:
    """The header of a growing image. Bytes."""

    header_size: int
    catalog: int
    """Entries."""
    bitmap_size: int
    """Of the bitmap that each extent begins with: a bit for each of its sectors."""
    extent_size: int
    disk_size: int

    @property
    def bitmap_bytes(self) -> int:
        """That a bitmap takes."""
        return round_up(self.bitmap_size, SECTOR)

    @property
    def data_offset(self) -> int:
        return self.header_size + 4 * self.catalog


@dataclass(frozen=True)
class Sparse:
    """The header of a sparse image. Bytes."""

    page_size: int
    pages: int
    """Entries of the page table."""
    disk_size: int

    @property
    def data_offset(self) -> int:
        return round_up(SPARSE_HEADER + 4 * self.pages, self.page_size)


def parse_redolog(head: bytes) -> Redolog:
    """Raises ImageCorrupt."""
    if len(head) < HEADER_BYTES:
        raise _corrupt("Image not in Bochs format", "magic", 0)
    magic, kind, subtype, version, header, catalog, bitmap, extent = _REDOLOG.unpack_from(head)
    names = [name.partition(b"\0")[0] for name in (magic, kind, subtype)]
    if names != [MAGIC, b"Redolog", b"Growing"] or version not in (VERSION_1, VERSION_2):
        raise _corrupt("Image not in Bochs format", "magic", 0)
    # Version 2 put a time between the sizes.
    at = _REDOLOG.size + (4 if version == VERSION_2 else 0)
    disk_size = struct.unpack_from("<Q", head, at)[0] // SECTOR * SECTOR
    if catalog > MAX_CATALOG:
        raise _corrupt("Catalog size is too large", "catalog entries", 72)
    if extent < SECTOR:
        raise _corrupt("Extent size must be at least 512", "extent size", 80)
    if extent & (extent - 1):
        raise _corrupt(f"Extent size {extent} is not a power of two", "extent size", 80)
    if extent > MAX_EXTENT:
        raise _corrupt(f"Extent size {extent} is too large", "extent size", 80)
    if catalog < -(-disk_size // extent):
        raise _corrupt("Catalog size is too small for this disk size", "catalog entries", 72)
    if bitmap * 8 < extent // SECTOR or bitmap > MAX_EXTENT:
        raise _corrupt(f"Bitmap size {bitmap} does not suit the extents", "bitmap size", 76)
    return Redolog(header, catalog, bitmap, extent, disk_size)


def parse_sparse(head: bytes) -> Sparse:
    """Raises ImageCorrupt or ImageUnsupported."""
    if len(head) < SPARSE_HEADER:
        raise _corrupt("Image not in Bochs format", "magic", 0)
    _magic, version, page_size, pages, disk_size = _SPARSE.unpack_from(head)
    if version != SPARSE_VERSION:
        raise ImageUnsupported(
            f"Sparse Bochs image of version {version} is not supported",
            format="bochs",
            structure="header",
            field="version",
            offset=4,
        )
    if not SECTOR <= page_size <= MAX_PAGE or page_size & (page_size - 1):
        raise _corrupt(f"Page size {page_size} is not supported", "page size", 8)
    if pages > MAX_PAGES:
        raise _corrupt("Page table is too large", "pages", 12)
    if disk_size % SECTOR or disk_size > pages * page_size:
        raise _corrupt("Page table is too small for this disk size", "disk size", 16)
    return Sparse(page_size, pages, disk_size)


class RedologMapping(ReadOnlyMapping):
    """The catalog says where an extent is, its bitmap which of its sectors were written to."""

    driver = "bochs"

    def __init__(self, disk: Disk, head: bytes) -> None:
        super().__init__(disk)
        self.header = parse_redolog(head)
        self.size = self.header.disk_size
        self.catalog = _table(
            self, self.header.header_size, self.header.catalog, "catalog entries"
        )
        self._bitmaps = TableCache(
            self.metadata,
            table_bytes=self.header.bitmap_size,
            capacity=BITMAP_CACHE,
            stage=Stage.TABLES,
        )

    def resolve(self, offset: int, length: int) -> list[Extent]:
        unit = self.header.extent_size
        extents: list[Extent] = []
        end = offset + length
        first = offset // unit
        for index, entries in self.catalog.runs(first, -(-end // unit) - first):
            for number, entry in enumerate(entries, index):
                start, stop = max(number * unit, offset), min((number + 1) * unit, end)
                if entry == NOWHERE:
                    append_extent(extents, Extent(start, stop - start, Kind.ZERO))
                    continue
                for run in self._written(number, entry, start, stop):
                    append_extent(extents, run)
        return extents

    def _written(self, number: int, entry: int, start: int, end: int) -> Iterator[Extent]:
        """Of a part of an extent that exists."""
        header = self.header
        place = header.data_offset + entry * (header.bitmap_bytes + header.extent_size)
        if place + header.bitmap_bytes > self.file.size:
            raise _outside(self.file, number, header.header_size)
        data = place + header.bitmap_bytes - number * header.extent_size
        bits = int.from_bytes(self._bitmaps.get(place), "little")
        first, last = (at - number * header.extent_size for at in (start, end - 1))
        sector = first // SECTOR
        while start < end:
            # Either the next sector that was not written to, or the next that was.
            written = bits >> sector & 1
            rest = (~bits if written else bits) >> sector
            run = (rest & -rest).bit_length() - 1 if rest else last // SECTOR + 1 - sector
            sector += run
            stop = min(number * header.extent_size + sector * SECTOR, end)
            if not written:
                yield Extent(start, stop - start, Kind.ZERO)
            elif data + stop > self.file.size:
                raise _outside(self.file, number, header.header_size)
            else:
                yield Extent(start, stop - start, Kind.DATA, self.file, data + start)
            start = stop

    def info(self) -> NodeInfo:
        return _info(self)


class SparseMapping(ReadOnlyMapping):
    """The page table says which page of the file holds a page of the disk."""

    driver = "bochs"

    def __init__(self, disk: Disk, head: bytes) -> None:
        super().__init__(disk)
        self.header = parse_sparse(head)
        self.size = self.header.disk_size
        self.pages = _table(self, SPARSE_HEADER, self.header.pages, "pages")

    def resolve(self, offset: int, length: int) -> list[Extent]:
        unit, base = self.header.page_size, self.header.data_offset
        extents: list[Extent] = []
        end = offset + length
        first = offset // unit
        for index, entries in self.pages.runs(first, -(-end // unit) - first):
            for number, entry in enumerate(entries, index):
                start, stop = max(number * unit, offset), min((number + 1) * unit, end)
                if entry == NOWHERE:
                    append_extent(extents, Extent(start, stop - start, Kind.ZERO))
                    continue
                place = base + entry * unit + start - number * unit
                if place + stop - start > self.file.size:
                    raise _outside(self.file, number, SPARSE_HEADER)
                append_extent(extents, Extent(start, stop - start, Kind.DATA, self.file, place))
        return extents

    def info(self) -> NodeInfo:
        return _info(self)


def _table(
    mapping: RedologMapping | SparseMapping, offset: int, entries: int, field: str
) -> BlockTable:
    if offset + 4 * entries > mapping.file.size:
        raise _corrupt("The table of places lies behind the end of the image", field, offset)
    return BlockTable(mapping.metadata, host_offset=offset, entries=entries)


def _info(mapping: RedologMapping | SparseMapping) -> NodeInfo:
    actual_size = mapping.file.info().actual_size
    return NodeInfo(mapping.disk.filename, "bochs", mapping.size, actual_size, dirty=None)


def _corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(message, format="bochs", structure="header", field=field, offset=offset)


def _outside(file: Node, number: int, table: int) -> ImageCorrupt:
    return ImageCorrupt(
        "Input/output error",
        path=file.filename,
        format="bochs",
        structure="table of places",
        field=f"entry {number}",
        offset=table + 4 * number,
    )


class BochsDriver(Driver):
    name = "bochs"
    is_format = True

    def open(self, options: Any, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk

        return Disk(context, _load)


def _load(disk: Disk) -> RedologMapping | SparseMapping:
    head = disk.file.read(0, min(HEADER_BYTES, disk.file.size))
    if int.from_bytes(head[:4], "little") == SPARSE_MAGIC:
        return SparseMapping(disk, head)
    return RedologMapping(disk, head)


DRIVER = BochsDriver()
