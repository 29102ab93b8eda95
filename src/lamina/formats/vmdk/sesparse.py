"""seSparse: the sparse extents of newer VMFS, for reading. Little-endian; figures in sectors.

No specification is public; this is what readers agree on. The constant header:

    0 magic   8 version   16 capacity   24 size of a grain   32 size of a grain table   40 flags
    80 volatile header   96 journal header   112 journal   128 grain directory   144 grain tables
    160 free bitmap   176 backmap   192 grains      (place and length, u64 each)

Entries of directory and tables are u64: what their highest digits mean is beside the constants.
"""

from __future__ import annotations

import struct
from array import array

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.vmdk.extents import ZERO_GRAIN
from lamina.formats.vmdk.tables import TablesExtent, read_words
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.records import dataclass
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node

MAGIC = 0xCAFEBABE
VOLATILE_MAGIC = 0xCAFECAFE
VERSION = 0x2_0000_0001
HEADER_SIZE = SECTOR
GRAIN = 8 * SECTOR
TABLE_SECTORS = 64
TABLE_ENTRIES = TABLE_SECTORS * SECTOR // 8
_FIXED = struct.Struct("<6Q")
_AREAS = struct.Struct("<16Q")
_AREAS_OFFSET = 80
_VOLATILE = struct.Struct("<4Q")
_DIRECTORY_ENTRY = 0x1000_0000
"""The upper half of an entry of the directory; the lower one is the number of a table."""
_UNMAPPED, _ZERO, _ALLOCATED = 1, 2, 3
"""The highest digit of an entry of a table; 0: not here."""


class Area(NamedTuple):
    """In bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class SeSparseHeader:
    capacity: int
    """Guest bytes."""
    volatile: Area
    directory: Area
    tables: Area
    grains: Area

    @property
    def directory_entries(self) -> int:
        return -(-self.capacity // (TABLE_ENTRIES * GRAIN))

    def pack(self) -> bytes:
        empty = Area(0, 0)
        areas = (self.volatile, empty, empty, self.directory, self.tables, empty, empty)
        figures = [figure // SECTOR for area in (*areas, self.grains) for figure in area]
        fixed = _FIXED.pack(
            MAGIC, VERSION, self.capacity // SECTOR, GRAIN // SECTOR, TABLE_SECTORS, 0
        )
        return (fixed.ljust(_AREAS_OFFSET, b"\0") + _AREAS.pack(*figures)).ljust(
            HEADER_SIZE, b"\0"
        )


def parse_header(data: bytes) -> SeSparseHeader:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""

    def corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
        return ImageCorrupt(
            message, format="vmdk", structure="seSparse header", field=field, offset=offset
        )

    def unsupported(field: str, value: int, offset: int) -> ImageUnsupported:
        return ImageUnsupported(
            f"Unsupported seSparse {field} {value:#x}",
            format="vmdk",
            structure="seSparse header",
            field=field,
            offset=offset,
        )

    if len(data) < HEADER_SIZE:
        raise corrupt("Image not in VMDK format", "magic", 0)
    magic, version, capacity, grain, table, flags = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise corrupt("Image not in VMDK format", "magic", 0)
    for field, offset, value, known in (
        ("version", 8, version, VERSION),
        ("grain size", 24, grain, GRAIN // SECTOR),
        ("grain table size", 32, table, TABLE_SECTORS),
        ("flags", 40, flags, 0),
    ):
        if value != known:
            raise unsupported(field, value, offset)
    if capacity * SECTOR >= 1 << 63:
        raise corrupt("The disk is larger than can be", "capacity", 16)
    figures = _AREAS.unpack_from(data, _AREAS_OFFSET)
    if any(figure * SECTOR >= 1 << 63 for figure in figures):
        raise corrupt("Offset lies behind the end of any file", "areas", _AREAS_OFFSET)
    areas = [
        Area(place * SECTOR, length * SECTOR)
        for place, length in zip(figures[::2], figures[1::2], strict=True)
    ]
    header = SeSparseHeader(capacity * SECTOR, areas[0], areas[3], areas[4], areas[7])
    if header.directory_entries * 8 > header.directory.length:
        raise corrupt("The grain directory is too small for the disk", "grain directory", 128)
    return header


def check_volatile(data: bytes) -> None:
    """The header that changes while the disk is in use. Raises ImageCorrupt, ImageUnsupported."""
    magic, _, _, replay_journal = _VOLATILE.unpack_from(data.ljust(_VOLATILE.size, b"\0"))
    if magic != VOLATILE_MAGIC:
        raise ImageCorrupt(
            "Image not in VMDK format",
            format="vmdk",
            structure="seSparse volatile header",
            field="magic",
        )
    if replay_journal:
        raise ImageUnsupported(
            "Image is dirty, Replaying journal not supported",
            format="vmdk",
            structure="seSparse volatile header",
            field="replay_journal",
        )


def pack_volatile() -> bytes:
    return _VOLATILE.pack(VOLATILE_MAGIC, 0, 0, 0).ljust(SECTOR, b"\0")


def grain_entry(index: int) -> int:
    """The entry of a table that names grain ``index`` of those that the file holds."""
    return _ALLOCATED << 60 | (index & 0xFFF) << 48 | index >> 12


class SeSparseExtent(TablesExtent):
    kind = "seSparse"
    table_entries = TABLE_ENTRIES

    def __init__(self, start: int, node: Node, header: SeSparseHeader) -> None:
        """Raises ImageCorrupt, ImageUnsupported."""
        super().__init__(start, header.capacity, node, GRAIN, format="SESPARSE", writable=False)
        check_volatile(node.read(header.volatile.offset, SECTOR))
        if header.directory.offset + header.directory_entries * 8 > node.size:
            raise self._corrupt("Grain directory lies outside of the image", "grain directory")
        self.header = header
        self._tables = {}

    def _corrupt(self, message: str, structure: str) -> ImageCorrupt:
        return ImageCorrupt(
            message, path=self.node.filename, format="vmdk", structure=f"seSparse {structure}"
        )

    def load_table(self, number: int) -> array[int] | None:
        if number >= self.header.directory_entries:
            return None
        place = self.header.directory.offset + number * 8
        entry = read_words(self.node, place, 1, code="Q")[0]
        if not entry:
            return None
        offset = (entry & 0xFFFF_FFFF) * TABLE_SECTORS * SECTOR
        if entry >> 32 != _DIRECTORY_ENTRY or offset >= self.header.tables.length:
            raise self._corrupt(f"Directory entry {number} is {entry:#x}", "grain directory")
        words = read_words(self.node, self.header.tables.offset + offset, TABLE_ENTRIES, code="Q")
        return array("Q", map(self._sector, words))

    def _sector(self, entry: int) -> int:
        kind = entry >> 60
        if kind == _ALLOCATED:
            index = entry >> 48 & 0xFFF | (entry & 0xFFFF_FFFF_FFFF) << 12
            sector = (self.header.grains.offset + index * GRAIN) // SECTOR
            # What is out of all bounds is so for arrays as well, and refused where it is used.
            return min(sector, 1 << 53)
        if kind in (_UNMAPPED, _ZERO):
            return ZERO_GRAIN
        if entry:
            raise self._corrupt(f"Entry {entry:#x} is of no known kind", "grain table")
        return 0
