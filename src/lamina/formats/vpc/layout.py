"""The structures of a VHD file: footer, dynamic disk header, parent locators. Big-endian.

"Virtual Hard Disk Image Format Specification", version 1.0; names of sections are given.
"""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt, ImageUnsupported, StorageError
from lamina.records import dataclass
from lamina.units import SECTOR

COOKIE = b"conectix"
DYNAMIC_COOKIE = b"cxsparse"
_FOOTER = struct.Struct(">8sIIQI4sHH4sQQHBBII16sB427s")
FOOTER_SIZE = _FOOTER.size
"""512 bytes."""
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
HEADER_SIZE = _HEADER.size
"""1024 bytes."""
_LOCATOR = struct.Struct(">4sIIIQ")

NOWHERE = 0xFFFFFFFFFFFFFFFF
FREE = 0xFFFFFFFF
"""A BAT entry: the block is not there."""
EPOCH = 946684800
"""2000-01-01, from which times are counted, in seconds of Unix."""

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
MAX_SECTORS = 0xFF000000
"""2040 GiB."""
MAX_TABLE_ENTRIES = (1 << 31) // 4 - 1
MAX_BLOCKS = 1 << 24
"""Entries of tables that are read. Nobody has blocks so small that the largest disk has more."""
DEFAULT_BLOCK = 2 << 20


@dataclass(frozen=True)
class Footer:
    """Section "Hard Disk Footer Format"; at the end of every file, and a copy at the beginning of
    those that are not fixed."""

    current_size: int
    """Guest bytes."""
    disk_type: int
    geometry: tuple[int, int, int]
    """Cylinders, heads, sectors per track."""
    data_offset: int = NOWHERE
    """Of the dynamic disk header."""
    timestamp: int = 0
    creator: bytes = b"qemu"
    creator_version: tuple[int, int] = (5, 3)
    creator_host: bytes = b"Wi2k"
    original_size: int = 0
    unique_id: bytes = bytes(16)
    saved_state: int = 0
    features: int = 2
    version: int = 0x10000
    rest: bytes = b""

    @property
    def chs_size(self) -> int:
        """Guest bytes that the geometry makes."""
        cylinders, heads, sectors = self.geometry
        return cylinders * heads * sectors * SECTOR

    def pack(self) -> bytes:
        return _with_checksum(
            _FOOTER.pack(
                COOKIE,
                self.features,
                self.version,
                self.data_offset,
                self.timestamp,
                self.creator,
                *self.creator_version,
                self.creator_host,
                self.original_size or self.current_size,
                self.current_size,
                *self.geometry,
                self.disk_type,
                0,
                self.unique_id,
                self.saved_state,
                self.rest,
            ),
            64,
        )


def parse_footer(data: bytes) -> Footer:
    """Raises ImageCorrupt for what is no footer, or a damaged one."""
    data = data.ljust(FOOTER_SIZE, b"\0")
    if not data.startswith(COOKIE):
        raise _corrupt("invalid VPC image", "footer", "cookie", 0)
    if not has_checksum(data, 64):
        raise _corrupt("Incorrect header checksum", "footer", "checksum", 64)
    values = _FOOTER.unpack(data)
    return Footer(
        current_size=values[10],
        disk_type=values[14],
        geometry=(values[11], values[12], values[13]),
        data_offset=values[3],
        timestamp=values[4],
        creator=values[5],
        creator_version=(values[6], values[7]),
        creator_host=values[8],
        original_size=values[9],
        unique_id=values[16],
        saved_state=values[17],
        features=values[1],
        version=values[2],
        rest=values[18],
    )


@dataclass(frozen=True)
class Locator:
    """Section "Parent Locator Entries"."""

    code: bytes = bytes(4)
    """W2ru (relative) and W2ku (absolute) are paths of Windows in UTF-16, MacX is a URL."""
    space: int = 0
    """Sectors kept for it; some writers count bytes."""
    length: int = 0
    """Bytes."""
    offset: int = 0

    def pack(self) -> bytes:
        return _LOCATOR.pack(self.code, self.space, self.length, 0, self.offset)


@dataclass(frozen=True)
class Header:
    """Section "Dynamic Disk Header Format"."""

    table_offset: int
    max_table_entries: int
    block_size: int = DEFAULT_BLOCK
    parent_id: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()
    """The slots in use."""

    @property
    def bitmap_bytes(self) -> int:
        """Of the sector bitmap in front of the data of a block: whole sectors."""
        return -(-self.block_size // (SECTOR * 8 * SECTOR)) * SECTOR

    @property
    def table_end(self) -> int:
        """Host offset behind the table, which takes whole sectors."""
        return self.table_offset + -(-4 * self.max_table_entries // SECTOR) * SECTOR

    def pack(self) -> bytes:
        locators = b"".join(locator.pack() for locator in self.locators)
        return _with_checksum(
            _HEADER.pack(
                DYNAMIC_COOKIE,
                NOWHERE,
                self.table_offset,
                0x10000,
                self.max_table_entries,
                self.block_size,
                0,
                self.parent_id,
                self.parent_timestamp,
                0,
                self.parent_name.encode("utf-16-be", "surrogatepass")[:512],
                locators,
                b"",
            ),
            36,
        )


def parse_header(data: bytes, size: int) -> Header:
    """``size``: guest bytes. The checksum is not looked at: some writers get it wrong.

    Raises ImageCorrupt or ImageUnsupported, naming the field.
    """
    if len(data) < HEADER_SIZE or not data.startswith(DYNAMIC_COOKIE):
        raise _corrupt("Invalid header magic", "dynamic header", "cookie", 0)
    values = _HEADER.unpack(data[:HEADER_SIZE])
    table_offset, entries, block_size = values[2], values[4], values[5]
    if block_size < SECTOR or block_size & (block_size - 1):
        raise _corrupt(f"Invalid block size {block_size}", "dynamic header", "block_size", 32)
    if entries > MAX_TABLE_ENTRIES:
        message = f"Max Table Entries too large ({entries})"
        raise _corrupt(message, "dynamic header", "max_table_entries", 28)
    if entries > MAX_BLOCKS:
        raise ImageUnsupported(
            f"Too many blocks: {entries}, of {block_size} bytes",
            format="vpc",
            structure="dynamic header",
            field="max_table_entries",
            offset=28,
        )
    if entries * block_size < size:
        raise _corrupt("Page table too small", "dynamic header", "max_table_entries", 28)
    if table_offset % SECTOR:
        raise ImageUnsupported(
            f"The block allocation table at {table_offset:#x} is not aligned",
            format="vpc",
            structure="dynamic header",
            field="table_offset",
            offset=16,
        )
    name = values[10].decode("utf-16-be", "replace").split("\0")[0]
    locators = tuple(
        Locator(code, space, length, offset)
        for code, space, length, _, offset in _LOCATOR.iter_unpack(values[11])
        if any(code)
    )
    return Header(table_offset, entries, block_size, values[7], values[8], name, locators)


def check_size(size: int) -> None:
    """Raises StorageError (EFBIG) for more guest bytes than the format has."""
    if size > MAX_SECTORS * SECTOR:
        raise StorageError.from_errno(27)


def _with_checksum(data: bytes, at: int) -> bytes:
    """Section "Checksum": the one's complement of the sum of all bytes, itself taken as 0."""
    return data[:at] + _checksum(data, at) + data[at + 4 :]


def has_checksum(data: bytes, at: int) -> bool:
    return data[at : at + 4] == _checksum(data, at)


def _checksum(data: bytes, at: int) -> bytes:
    total = sum(data) - sum(data[at : at + 4])
    return (~total & 0xFFFFFFFF).to_bytes(4, "big")


def _corrupt(message: str, structure: str, field: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(message, format="vpc", structure=structure, field=field, offset=offset)
