"""The metadata region [2.6]: a table of items, and what the items say about the disk."""

from __future__ import annotations

import struct

from lamina.errors import ImageUnsupported
from lamina.formats.vhdx.layout import MAX_ENTRIES, corrupt, guid, guid_text
from lamina.records import dataclass
from lamina.units import KIB, MIB, TIB

METADATA_BYTES = MIB
METADATA_TABLE_BYTES = 64 * KIB
MAX_ITEM_BYTES = MIB
_METADATA = struct.Struct("<8sHH20x")
_ITEM = struct.Struct("<16sIII")
ITEM_BYTES = 32
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4

MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB
MAX_SIZE = 64 * TIB
SECTORS = (512, 4096)
BITMAP_BYTES = MIB
"""A sector bitmap block: a bit for each of 2^23 logical sectors [2.5]."""

FILE_PARAMETERS = guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID = guid("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = guid("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_KNOWN_ITEMS = (
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR,
)


@dataclass(frozen=True)
class Item:
    """An entry of the metadata table; ``offset`` counts from the start of the region."""

    guid: bytes
    offset: int
    length: int
    flags: int

    def pack(self) -> bytes:
        """The entry but for its last four bytes, which mean nothing."""
        return _ITEM.pack(self.guid, self.offset, self.length, self.flags)


def pack_items(items: list[Item]) -> bytes:
    return _METADATA.pack(b"metadata", 0, len(items)) + b"".join(
        item.pack().ljust(ITEM_BYTES, b"\0") for item in items
    )


def items_end(table: bytes | bytearray) -> int:
    """Where the entries of a metadata table end, which is sound."""
    return _METADATA.size + ITEM_BYTES * int(_METADATA.unpack_from(table)[2])


def parse_items(table: bytes, region_length: int) -> dict[bytes, Item]:
    """The system items by GUID; ``table``: the first 64 KiB of the region.

    Raises ImageCorrupt, and ImageUnsupported for what is required and not known.
    """
    if len(table) < METADATA_TABLE_BYTES or table[:8] != b"metadata":
        raise corrupt("The VHDX metadata table has no signature", "metadata table", "Signature")
    _, _, count = _METADATA.unpack_from(table)
    if count > MAX_ENTRIES:
        raise corrupt(
            f"The VHDX metadata table has {count} entries, more than {MAX_ENTRIES}",
            "metadata table",
            "EntryCount",
        )
    items: dict[bytes, Item] = {}
    seen: set[tuple[bytes, int]] = set()
    for number in range(count):
        name, offset, length, flags = _ITEM.unpack_from(table, _METADATA.size + ITEM_BYTES * number)
        item = Item(name, offset, length, flags)
        where = f"entry {number}"
        # A user item may have the GUID of a system item.
        if (name, flags & IS_USER) in seen:
            raise corrupt(
                f"VHDX metadata item {guid_text(name)} is there twice", "metadata table", where
            )
        seen.add((name, flags & IS_USER))
        if (offset or length) and (
            offset < METADATA_TABLE_BYTES
            or length > MAX_ITEM_BYTES
            or offset + length > region_length
        ):
            raise corrupt(
                f"VHDX metadata item {guid_text(name)} lies outside of its region",
                "metadata table",
                where,
            )
        if flags & IS_USER or name not in _KNOWN_ITEMS:
            if flags & IS_REQUIRED:
                raise ImageUnsupported(
                    f"VHDX metadata item {guid_text(name)} is not supported",
                    format="vhdx",
                    structure="metadata table",
                    field=where,
                )
            continue
        items[name] = item
    return items


@dataclass(frozen=True)
class Parameters:
    """What the metadata items say about the disk. Bytes."""

    size: int
    block_size: int
    leave_allocated: bool = False
    """A fixed image: blocks stay allocated."""
    has_parent: bool = False
    logical_sector: int = 512
    physical_sector: int = 512
    disk_id: bytes = bytes(16)

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks whose sectors one bitmap block describes [2.5]."""
        return (8 * BITMAP_BYTES) * self.logical_sector // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def bat_entries(self) -> int:
        """A differencing image has a bitmap entry for its last chunk too [2.5]."""
        ratio, blocks = self.chunk_ratio, self.blocks
        if self.has_parent:
            return -(-blocks // ratio) * (ratio + 1)
        return blocks + max(blocks - 1, 0) // ratio

    def pack(self) -> list[tuple[bytes, int, bytes]]:
        """(GUID, flags, content) of the items."""
        flags = self.leave_allocated | self.has_parent << 1
        disk = IS_VIRTUAL_DISK | IS_REQUIRED
        return [
            (FILE_PARAMETERS, IS_REQUIRED, struct.pack("<II", self.block_size, flags)),
            (VIRTUAL_DISK_SIZE, disk, struct.pack("<Q", self.size)),
            (VIRTUAL_DISK_ID, disk, self.disk_id),
            (LOGICAL_SECTOR_SIZE, disk, struct.pack("<I", self.logical_sector)),
            (PHYSICAL_SECTOR_SIZE, disk, struct.pack("<I", self.physical_sector)),
        ]


ITEM_LENGTHS = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    VIRTUAL_DISK_ID: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
}


def parse_parameters(content: dict[bytes, bytes]) -> Parameters:
    """From the content of the items. Raises ImageCorrupt, ImageUnsupported."""
    for name, length in ITEM_LENGTHS.items():
        if len(content.get(name, b"")) < length:
            raise corrupt(
                f"VHDX metadata item {guid_text(name)} is missing or too short",
                "metadata",
                guid_text(name),
            )
    block_size, flags = struct.unpack_from("<II", content[FILE_PARAMETERS])
    (size,) = struct.unpack_from("<Q", content[VIRTUAL_DISK_SIZE])
    (logical,) = struct.unpack_from("<I", content[LOGICAL_SECTOR_SIZE])
    (physical,) = struct.unpack_from("<I", content[PHYSICAL_SECTOR_SIZE])
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        raise corrupt(f"VHDX block size {block_size} is not valid", "metadata", "BlockSize")
    if logical not in SECTORS:
        raise ImageUnsupported(
            f"VHDX logical sector size {logical} is not supported",
            format="vhdx",
            structure="metadata",
            field="LogicalSectorSize",
        )
    if size > MAX_SIZE:
        raise corrupt(
            f"VHDX disk size {size} is larger than 64 TiB", "metadata", "VirtualDiskSize"
        )
    if flags & 2 and not content.get(PARENT_LOCATOR):
        raise corrupt(
            "The VHDX image has a parent but no parent locator", "metadata", "Parent Locator"
        )
    disk_id = content[VIRTUAL_DISK_ID][:16]
    return Parameters(
        size, block_size, bool(flags & 1), bool(flags & 2), logical, physical, disk_id
    )
