"""The header of an expandable image (``docs/interop/parallels.rst`` of QEMU). Little-endian.

The block allocation table (BAT) follows it: a number for each cluster of the disk, in sectors
(``WithoutFreeSpace``) or in clusters (``WithouFreSpacExt``) from the start of the file.
"""

from __future__ import annotations

import errno
import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.records import dataclass
from lamina.units import SECTOR, round_up

MAGIC_SECTORS = b"WithoutFreeSpace"
MAGIC_CLUSTERS = b"WithouFreSpacExt"
DESCRIPTOR_ROOT = "Parallels_disk_image"
"""The root element of the other kind of file there is, a bundle's ``DiskDescriptor.xml``."""
_HEADER = struct.Struct("<16sIIIIIQIIIQ")
SIZE = _HEADER.size
"""64 bytes."""
VERSION = 2
HEADS = 16
SECTORS_PER_TRACK = 32

IN_USE_OFFSET = 44
IN_USE = 0x746F6E59
CLOSED = 0x312E3276
"""What those leave who know of the format extension; all others leave 0."""

MAX_CLUSTER_SECTORS = 0x7FFFFFFF // 513
MAX_ENTRIES = 0x7FFFFFFF // 4
MAX_SECTORS = 1 << 54


@dataclass(frozen=True)
class Header:
    """Sectors and clusters as they are stored; the properties are bytes."""

    cluster_sectors: int
    entries: int
    """Of the BAT."""
    sectors: int
    """Of the disk."""
    data_start: int
    """In sectors; 0: behind the BAT."""
    by_cluster: bool = True
    """The newer magic: entries count clusters."""
    in_use: int = 0
    extension_sector: int = 0
    """Where the format extension is; 0: there is none."""
    flags: int = 0

    @property
    def cluster_size(self) -> int:
        return self.cluster_sectors * SECTOR

    @property
    def size(self) -> int:
        """Of the disk."""
        return self.sectors * SECTOR

    @property
    def table_end(self) -> int:
        return SIZE + 4 * self.entries

    @property
    def entry_scale(self) -> int:
        """Bytes that an entry of 1 stands for."""
        return self.cluster_size if self.by_cluster else SECTOR

    @property
    def default_data_offset(self) -> int:
        """The first place behind the BAT at which data may begin."""
        return round_up(self.table_end, self.entry_scale)

    def is_sound_data_start(self, file_size: int) -> bool:
        """Whether ``data_start`` obeys the rules."""
        start = self.data_start * SECTOR
        if start == 0:
            return not self.by_cluster
        if self.by_cluster and start % self.cluster_size:
            return False
        return self.table_end <= start <= file_size

    def pack(self) -> bytes:
        cylinders = self.sectors // (HEADS * SECTORS_PER_TRACK)
        return _HEADER.pack(
            MAGIC_CLUSTERS if self.by_cluster else MAGIC_SECTORS,
            VERSION,
            HEADS,
            cylinders & 0xFFFFFFFF,
            self.cluster_sectors,
            self.entries,
            self.sectors,
            self.in_use,
            self.data_start,
            self.flags,
            self.extension_sector,
        )


def parse(data: bytes) -> Header:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""
    if len(data) < SIZE:
        raise _corrupt("Image not in Parallels format", "magic", 0)
    fields = _HEADER.unpack_from(data)
    magic, version, _heads, _cylinders, tracks, entries, sectors, in_use = fields[:8]
    data_start, flags, extension = fields[8:]
    if magic not in (MAGIC_SECTORS, MAGIC_CLUSTERS):
        raise _corrupt("Image not in Parallels format", "magic", 0)
    if version != VERSION:
        raise ImageUnsupported(
            "Image not in Parallels format",
            format="parallels",
            structure="header",
            field="version",
            offset=16,
        )
    by_cluster = magic == MAGIC_CLUSTERS
    if tracks == 0:
        raise _corrupt("Invalid image: Zero sectors per track", "tracks", 28)
    if tracks > MAX_CLUSTER_SECTORS:
        raise _corrupt("Invalid image: Too big cluster", "tracks", 28)
    if entries > MAX_ENTRIES:
        raise _corrupt("Catalog too large", "nb_bat_entries", 32)
    if not by_cluster:
        sectors &= 0xFFFFFFFF
    if sectors > MAX_SECTORS:
        raise _corrupt("File too large", "nb_sectors", 36, errno=errno.EFBIG)
    if sectors > entries * tracks:
        raise _corrupt("The BAT has no entries for all of the disk", "nb_bat_entries", 32)
    if extension > MAX_SECTORS:
        raise _corrupt("Invalid image: Too big offset", "ext_off", 56)
    return Header(tracks, entries, sectors, data_start, by_cluster, in_use, extension, flags)


def _corrupt(
    message: str, field: str, offset: int, *, errno: int | None = None
) -> ImageCorrupt:
    return ImageCorrupt(
        message, format="parallels", structure="header", field=field, offset=offset, errno=errno
    )
