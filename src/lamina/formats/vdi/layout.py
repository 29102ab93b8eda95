"""The header of VDI and the entries of its block map. Little-endian; there is no official text.

Header 1.1: 512 bytes, of which the first 72 are a text for people, a signature and the version.
"""

from __future__ import annotations

import errno
import struct

from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, StorageError
from lamina.records import dataclass
from lamina.units import MIB, SECTOR

SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
SIZE = 512
_HEADER = struct.Struct("<64sIIIII256sII3IIIQIIII16s16s16s16s56s")
BLOCK = MIB
"""Bytes of a block: the only size in use."""
FREE = 0xFFFFFFFF
"""A map entry: nothing is allocated; a differencing image shows its parent."""
ZERO = 0xFFFFFFFE
"""A map entry: nothing is allocated, the block reads as zeroes."""
MAX_BLOCKS = 0x1FFFFF80
MAX_SIZE = MAX_BLOCKS * BLOCK
"""Guest bytes."""

DYNAMIC, STATIC, DIFFERENCING = 1, 2, 4
NO_UUID = bytes(16)

DISK_SIZE_OFFSET = 0x170
BLOCKS_OFFSET = 0x180
ALLOCATED_OFFSET = 0x184


@dataclass(frozen=True)
class Header:
    disk_size: int
    """Guest bytes."""
    offset_data: int
    blocks_in_image: int
    blocks_allocated: int = 0
    offset_bmap: int = 0x200
    image_type: int = DYNAMIC
    text: bytes = b"<<< QEMU VM Virtual Disk Image >>>\n"
    header_size: int = 0x180
    image_flags: int = 0
    description: bytes = b""
    geometry: tuple[int, int, int] = (0, 0, 0)
    """Cylinders, heads and sectors, of no use to anybody."""
    block_extra: int = 0
    """Bytes in front of the data of each block."""
    uuid_image: bytes = NO_UUID
    uuid_last_snapshot: bytes = NO_UUID
    uuid_link: bytes = NO_UUID
    uuid_parent: bytes = NO_UUID
    rest: bytes = b""

    @property
    def differencing(self) -> bool:
        """Blocks that are not here are in another image."""
        return self.uuid_link != NO_UUID or self.uuid_parent != NO_UUID

    @property
    def map_end(self) -> int:
        """Host offset of the first byte behind the entries in use."""
        return self.offset_bmap + 4 * self.blocks_in_image

    def pack(self) -> bytes:
        return _HEADER.pack(
            self.text,
            SIGNATURE,
            VERSION,
            self.header_size,
            self.image_type,
            self.image_flags,
            self.description,
            self.offset_bmap,
            self.offset_data,
            *self.geometry,
            SECTOR,
            0,
            self.disk_size,
            BLOCK,
            self.block_extra,
            self.blocks_in_image,
            self.blocks_allocated,
            self.uuid_image,
            self.uuid_last_snapshot,
            self.uuid_link,
            self.uuid_parent,
            self.rest,
        )


def parse(data: bytes) -> Header:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""
    values = _HEADER.unpack(data[:SIZE].ljust(SIZE, b"\0"))
    text, signature, version, header_size, image_type, flags, description = values[:7]
    offset_bmap, offset_data = values[7:9]
    sector_size, _unused, disk_size, block_size, block_extra, blocks, allocated = values[12:19]
    if signature != SIGNATURE:
        raise ImageCorrupt(
            f"Image not in VDI format (bad signature {signature:08x})",
            format="vdi",
            structure="header",
            field="signature",
            offset=0x40,
        )
    if version != VERSION:
        raise _unsupported(f"version {version >> 16}.{version & 0xFFFF}", "version", 0x44)
    check_size(disk_size)
    if offset_bmap % SECTOR:
        raise _unsupported(f"unaligned block map offset {offset_bmap:#x}", "offset_bmap", 0x154)
    if offset_data % SECTOR:
        raise _unsupported(f"unaligned data offset {offset_data:#x}", "offset_data", 0x158)
    if sector_size != SECTOR:
        raise _unsupported(f"sector size {sector_size} is not {SECTOR}", "sector_size", 0x168)
    if block_size != BLOCK:
        raise _unsupported(f"block size {block_size} is not {BLOCK}", "block_size", 0x178)
    if block_extra:
        raise _unsupported(f"{block_extra} extra bytes in each block", "block_extra", 0x17C)
    disk_size = -(-disk_size // SECTOR) * SECTOR
    if disk_size > blocks * BLOCK:
        raise _unsupported(
            f"disk size {disk_size}, image bitmap has room for {blocks * BLOCK}",
            "blocks_in_image",
            BLOCKS_OFFSET,
        )
    if blocks > MAX_BLOCKS:
        raise _unsupported(
            f"too many blocks {blocks}, max is {MAX_BLOCKS}", "blocks_in_image", BLOCKS_OFFSET
        )
    return Header(
        disk_size,
        offset_data,
        blocks,
        allocated,
        offset_bmap,
        image_type,
        text,
        header_size,
        flags,
        description,
        (values[9], values[10], values[11]),
        block_extra,
        *values[19:],
    )


def check_map(header: Header, file_size: int) -> None:
    """Raises ImageCorrupt unless the map has a place of its own in a file of so many bytes."""
    if header.offset_bmap < SIZE or header.map_end > header.offset_data:
        raise ImageCorrupt(
            f"The block map at {header.offset_bmap:#x} overlaps the header or the data",
            format="vdi",
            structure="header",
            field="offset_data",
            offset=0x158,
        )
    if header.map_end > file_size:
        raise ImageCorrupt(
            "The block map lies behind the end of the image",
            format="vdi",
            structure="header",
            field="offset_bmap",
            offset=0x154,
        )


def check_size(size: int) -> None:
    """Raises StorageError for more guest bytes than a map can name."""
    if size > MAX_SIZE:
        raise StorageError(
            f"Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})",
            errno=errno.ENOTSUP,
            format="vdi",
            structure="header",
            field="disk_size",
            offset=DISK_SIZE_OFFSET,
        )


def _unsupported(what: str, field: str, offset: int) -> LaminaError:
    return ImageUnsupported(
        f"unsupported VDI image ({what})",
        format="vdi",
        structure="header",
        field=field,
        offset=offset,
    )
