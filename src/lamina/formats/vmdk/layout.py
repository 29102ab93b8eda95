"""Sparse extents of VMware's hosted products: header, markers, entries of tables.

"Virtual Disk Format 5.0", sections "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse
Extents". Little-endian. Numbers on disk count sectors; in these classes they count bytes.
"""

from __future__ import annotations

import errno
import struct

from lamina.errors import ImageCorrupt, ImageUnsupported, StorageError
from lamina.hints import NamedTuple
from lamina.records import dataclass
from lamina.units import SECTOR

MAGIC = b"KDMV"
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
HEADER_SIZE = SECTOR
HEADER_FIELDS = _HEADER.size
"""Bytes of the header that mean something."""
DIRECTORY_FIELD = 56
"""Where in the header the place of the grain directory is."""
UNCLEAN_FIELD = 72

LINE_ENDINGS_VALID = 1 << 0
REDUNDANT = 1 << 1
ZEROED_GRAINS = 1 << 2
COMPRESSED = 1 << 16
MARKERS = 1 << 17

_LINE_ENDINGS = b"\n \r\n"
"""What a transfer in text mode would change."""
COMPRESS_NONE, COMPRESS_DEFLATE = 0, 1
AT_END = (1 << 64) - 1
"""In place of the grain directory's sector: see the footer."""

GRAIN = 64 << 10
"""Bytes of a grain, as everybody writes them."""
TABLE_ENTRIES = 512
ENTRY_SIZE = 4
MAX_GRAIN = 64 << 20
"""Bytes: a thousand times the usual. Grains are decoded and copied as a whole."""
MAX_DIRECTORY_ENTRIES = 32 << 20
MAX_SECTOR = (1 << 32) - 1
DESCRIPTOR_OFFSET = SECTOR
DESCRIPTOR_SIZE = 20 * SECTOR
TRAILER_SIZE = 3 * SECTOR
"""The last sectors of a file with a footer: its marker, the footer, the end of the stream."""

MARKER_END, MARKER_TABLE, MARKER_DIRECTORY, MARKER_FOOTER = range(4)
_MARKER = struct.Struct("<QII")
_GRAIN_MARKER = struct.Struct("<QI")
GRAIN_MARKER_SIZE = _GRAIN_MARKER.size


@dataclass(frozen=True)
class SparseHeader:
    capacity: int
    """Guest bytes."""
    directory_offset: int
    """Of the grain directory; -1: the footer knows."""
    overhead: int
    """Where the first grain may be."""
    version: int = 1
    flags: int = LINE_ENDINGS_VALID | REDUNDANT
    grain: int = GRAIN
    descriptor_offset: int = DESCRIPTOR_OFFSET
    """0: the descriptor is in a file of its own."""
    descriptor_size: int = DESCRIPTOR_SIZE
    table_entries: int = TABLE_ENTRIES
    redundant_offset: int = 0
    unclean: bool = False
    compression: int = COMPRESS_NONE

    @property
    def table_bytes(self) -> int:
        return self.table_entries * ENTRY_SIZE

    @property
    def table_coverage(self) -> int:
        """Guest bytes behind one grain table."""
        return self.table_entries * self.grain

    @property
    def directory_entries(self) -> int:
        return -(-self.capacity // self.table_coverage)

    @property
    def compressed(self) -> bool:
        return bool(self.flags & COMPRESSED)

    @property
    def zeroed_grains(self) -> bool:
        return bool(self.flags & ZEROED_GRAINS)

    @property
    def has_redundant(self) -> bool:
        return bool(self.flags & REDUNDANT) and self.redundant_offset > 0

    def pack(self) -> bytes:
        """512 bytes."""
        directory = AT_END if self.directory_offset < 0 else self.directory_offset // SECTOR
        return _HEADER.pack(
            MAGIC,
            self.version,
            self.flags,
            self.capacity // SECTOR,
            self.grain // SECTOR,
            self.descriptor_offset // SECTOR,
            self.descriptor_size // SECTOR,
            self.table_entries,
            self.redundant_offset // SECTOR,
            directory,
            self.overhead // SECTOR,
            self.unclean,
            _LINE_ENDINGS,
            self.compression,
        ).ljust(HEADER_SIZE, b"\0")


def parse_header(data: bytes, *, structure: str = "header") -> SparseHeader:
    """Raises ImageCorrupt, ImageUnsupported or StorageError (EFBIG), naming the field."""

    def corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
        return ImageCorrupt(
            message, format="vmdk", structure=structure, field=field, offset=offset
        )

    if len(data) < HEADER_SIZE or data[:4] != MAGIC:
        raise corrupt("Image not in VMDK format", "magicNumber", 0)
    (
        _,
        version,
        flags,
        capacity,
        grain,
        descriptor_offset,
        descriptor_size,
        table_entries,
        redundant,
        directory,
        overhead,
        unclean,
        line_endings,
        compression,
    ) = _HEADER.unpack_from(data)
    if not 1 <= version <= 3:
        raise ImageUnsupported(
            f"Unsupported VMDK version {version}",
            format="vmdk",
            structure=structure,
            field="version",
            offset=4,
        )
    if table_entries > TABLE_ENTRIES:
        raise corrupt("L2 table size too big", "numGTEsPerGT", 44)
    if not table_entries or not grain:
        raise corrupt("L1 entry size is invalid", "numGTEsPerGT", 44)
    if grain & (grain - 1) or grain * SECTOR > MAX_GRAIN:
        raise corrupt("Invalid granularity, image may be corrupt", "grainSize", 20)
    if -(-capacity // (table_entries * grain)) > MAX_DIRECTORY_ENTRIES:
        raise corrupt("L1 size too big", "capacity", 12)
    if capacity * SECTOR >= 1 << 63:
        raise StorageError("File too large", errno=errno.EFBIG)
    if flags & LINE_ENDINGS_VALID and line_endings != _LINE_ENDINGS:
        raise corrupt(
            "The image was damaged by a transfer in text mode", "singleEndLineChar", 73
        )
    if flags & COMPRESSED and compression != COMPRESS_DEFLATE:
        raise ImageUnsupported(
            f"Unsupported compression algorithm {compression}",
            format="vmdk",
            structure=structure,
            field="compressAlgorithm",
            offset=77,
        )
    for value, field, offset in (
        (descriptor_offset, "descriptorOffset", 28),
        (descriptor_size, "descriptorSize", 36),
        (redundant, "rgdOffset", 48),
        (0 if directory == AT_END else directory, "gdOffset", 56),
        (overhead, "overHead", 64),
    ):
        if value * SECTOR >= 1 << 63:
            raise corrupt("Offset lies behind the end of any file", field, offset)
    return SparseHeader(
        capacity=capacity * SECTOR,
        directory_offset=-1 if directory == AT_END else directory * SECTOR,
        overhead=overhead * SECTOR,
        version=version,
        flags=flags,
        grain=grain * SECTOR,
        descriptor_offset=descriptor_offset * SECTOR,
        descriptor_size=descriptor_size * SECTOR,
        table_entries=table_entries,
        redundant_offset=redundant * SECTOR,
        unclean=bool(unclean),
        compression=compression,
    )


def parse_footer(data: bytes) -> SparseHeader:
    """The last three sectors of a file whose header does not know its grain directory.

    Raises ImageCorrupt, ImageUnsupported.
    """
    invalid = ImageCorrupt("Invalid footer", format="vmdk", structure="footer")
    if len(data) != TRAILER_SIZE:
        raise invalid
    begin = parse_marker(data)
    end = parse_marker(data[2 * SECTOR :])
    if begin.size or begin.kind != MARKER_FOOTER or end != (0, 0, MARKER_END):
        raise invalid
    footer = data[SECTOR : 2 * SECTOR]
    if footer[:4] != MAGIC:
        raise invalid
    header = parse_header(footer, structure="footer")
    if header.directory_offset < 0:
        raise invalid
    return header


class Marker(NamedTuple):
    """What stands in front of everything in a stream. A grain's size is not 0."""

    value: int
    """Sectors that follow; of a grain: its first sector."""
    size: int
    """Bytes of the compressed grain."""
    kind: int
    """One of ``MARKER_…``; of a grain, the first bytes of its data."""


def parse_marker(data: bytes | memoryview) -> Marker:
    return Marker(*_MARKER.unpack_from(data))


def pack_marker(kind: int, length: int) -> bytes:
    """A sector that announces ``length`` bytes of metadata."""
    return _MARKER.pack(length // SECTOR, 0, kind).ljust(SECTOR, b"\0")


def pack_grain(guest_offset: int, encoded: bytes) -> bytes:
    """A compressed grain with its marker, in whole sectors."""
    grain = _GRAIN_MARKER.pack(guest_offset // SECTOR, len(encoded)) + encoded
    return grain.ljust(-(-len(grain) // SECTOR) * SECTOR, b"\0")
