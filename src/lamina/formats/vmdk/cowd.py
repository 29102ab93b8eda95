"""COWD: sparse extents of VMFS ("vmfsSparse") and of VMware's oldest products, for reading.

"Virtual Disk Format 5.0", section "ESX Server Sparse Extents". Little-endian, figures in sectors:

    0 "COWD"   4 version   8 flags   12 size of the disk   16 size of a grain
    20 place of the directory   24 entries of the directory   28 next free sector

A directory of u32 names tables of 4096 u32; 0: there is none.
"""

from __future__ import annotations

import struct
from array import array

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.vmdk.layout import MAX_GRAIN
from lamina.formats.vmdk.tables import TablesExtent, read_words
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node

MAGIC = b"COWD"
HEADER_SIZE = 4 * SECTOR
_HEADER = struct.Struct("<4s7I")
TABLE_ENTRIES = 4096
_ENTRY_SIZE = 4


@dataclass(frozen=True)
class CowdHeader:
    capacity: int
    """Guest bytes."""
    grain: int
    directory_offset: int
    directory_entries: int

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            1,
            3,
            self.capacity // SECTOR,
            self.grain // SECTOR,
            self.directory_offset // SECTOR,
            self.directory_entries,
            0,
        ).ljust(HEADER_SIZE, b"\0")


def parse_header(data: bytes) -> CowdHeader:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""

    def corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
        return ImageCorrupt(
            message, format="vmdk", structure="COWD header", field=field, offset=offset
        )

    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise corrupt("Image not in VMDK format", "magicNumber", 0)
    _, version, _, sectors, grain, directory, entries, _ = _HEADER.unpack_from(data)
    if version != 1:
        raise ImageUnsupported(
            f"Unsupported VMDK version {version}",
            format="vmdk",
            structure="COWD header",
            field="version",
            offset=4,
        )
    if not grain or grain * SECTOR > MAX_GRAIN:
        raise corrupt("Invalid granularity, image may be corrupt", "grainSize", 16)
    if entries * TABLE_ENTRIES * grain < sectors:
        raise corrupt("L1 size is too small for the disk", "numGDEntries", 24)
    used = -(-sectors // (TABLE_ENTRIES * grain))
    return CowdHeader(sectors * SECTOR, grain * SECTOR, directory * SECTOR, used)


class CowdExtent(TablesExtent):
    kind = "vmfsSparse"
    table_entries = TABLE_ENTRIES

    def __init__(self, start: int, node: Node, header: CowdHeader) -> None:
        super().__init__(
            start, header.capacity, node, header.grain, format="VMFSSPARSE", writable=False
        )
        end = header.directory_offset + header.directory_entries * _ENTRY_SIZE
        if end > node.size:
            raise ImageCorrupt(
                "Grain directory lies outside of the image",
                path=node.filename,
                format="vmdk",
                structure="COWD header",
                field="gdOffset",
                offset=20,
            )
        self.header = header
        self._tables = {}

    def load_table(self, number: int) -> array[int] | None:
        if number >= self.header.directory_entries:
            return None
        place = self.header.directory_offset + number * _ENTRY_SIZE
        offset = read_words(self.node, place, 1)[0] * SECTOR
        if not offset:
            return None
        if offset >= self.file_end:
            raise self.misplaced_table(offset, number, place)
        return read_words(self.node, offset, TABLE_ENTRIES)
