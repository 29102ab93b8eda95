"""The header of QED and its table entries. Little-endian; section numbers are those of qed_spec."""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.records import dataclass
from lamina.units import SECTOR

MAGIC = b"QED\0"
_HEADER = struct.Struct("<4sIIIQQQQQII")
SIZE = _HEADER.size
"""64 bytes."""

BACKING_FILE = 1
"""The image has a backing file."""
NEED_CHECK = 2
"""Somebody was writing: check the tables before they are trusted."""
NO_PROBE = 4
"""The backing file is raw, whatever it looks like."""
KNOWN_FEATURES = BACKING_FILE | NEED_CHECK | NO_PROBE

MIN_CLUSTER, MAX_CLUSTER = 4096, 64 << 20
MAX_TABLE = 16
DEFAULT_CLUSTER = 65536
DEFAULT_TABLE = 4
MAX_BACKING_NAME = 1023
"""Bytes."""

FEATURES_OFFSET = 16
AUTOCLEAR_OFFSET = 32
IMAGE_SIZE_OFFSET = 48

ZERO_CLUSTER = 1
"""An L2 entry: the cluster reads as zeroes, whatever the backing file holds. 0: not allocated."""


@dataclass(frozen=True)
class Header:
    """Section "Header"."""

    image_size: int
    """Guest bytes."""
    cluster_size: int = DEFAULT_CLUSTER
    table_size: int = DEFAULT_TABLE
    """Clusters of an L1 or L2 table."""
    header_size: int = 1
    """Clusters that the header takes, with what follows it."""
    features: int = 0
    compat_features: int = 0
    autoclear_features: int = 0
    l1_table_offset: int = 0
    backing_offset: int = 0
    """Of the name of the backing file, in the header."""
    backing_size: int = 0

    @property
    def table_bytes(self) -> int:
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        return self.table_bytes // 8

    @property
    def header_bytes(self) -> int:
        return self.header_size * self.cluster_size

    @property
    def max_image_size(self) -> int:
        return max_image_size(self.cluster_size, self.table_size)

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            self.cluster_size,
            self.table_size,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.image_size,
            self.backing_offset,
            self.backing_size,
        )


def max_image_size(cluster_size: int, table_size: int) -> int:
    """Guest bytes that two levels of tables can address."""
    entries = table_size * cluster_size // 8
    return entries * entries * cluster_size


def parse(data: bytes, file_size: int) -> Header:
    """``file_size``: bytes, rounded up to sectors. Raises ImageCorrupt or ImageUnsupported."""
    if len(data) < SIZE or not data.startswith(MAGIC):
        raise _corrupt("Image not in QED format", "magic", 0)
    header = Header(*_fields(data))
    if header.features & ~KNOWN_FEATURES:
        raise ImageUnsupported(
            f"Unsupported QED features: {header.features & ~KNOWN_FEATURES:x}",
            format="qed",
            structure="header",
            field="features",
            offset=FEATURES_OFFSET,
        )
    if not is_power(header.cluster_size, MIN_CLUSTER, MAX_CLUSTER):
        raise _corrupt("QED cluster size is invalid", "cluster_size", 4)
    if not is_power(header.table_size, 1, MAX_TABLE):
        raise _corrupt("QED table size is invalid", "table_size", 8)
    largest = min(header.max_image_size, (1 << 63) - SECTOR)
    if header.image_size % SECTOR or header.image_size > largest:
        raise _corrupt("QED image size is invalid", "image_size", IMAGE_SIZE_OFFSET)
    if not header.header_size:
        raise _corrupt("QED header size is invalid", "header_size", 12)
    table = header.l1_table_offset
    if (
        table % header.cluster_size
        or table < header.header_bytes
        or table + header.table_bytes > file_size
    ):
        raise _corrupt("QED table offset is invalid", "l1_table_offset", 40)
    if header.header_bytes >> 32:
        raise _corrupt("QED header size is too large", "header_size", 12)
    if header.features & BACKING_FILE:
        inside = header.backing_offset >= SIZE
        inside &= header.backing_offset + header.backing_size <= header.header_bytes
        if not inside or header.backing_size > MAX_BACKING_NAME:
            raise _corrupt(
                "QED backing filename offset is invalid", "backing_filename_offset", 56
            )
    return header


def _fields(data: bytes) -> tuple[int, ...]:
    """In the order of the fields of ``Header``."""
    values: tuple[int, ...] = _HEADER.unpack_from(data)[1:]
    cluster_size, table_size, header_size, features, compat, autoclear, table, size = values[:8]
    return (
        size, cluster_size, table_size, header_size, features, compat, autoclear, table, *values[8:]
    )


def is_power(value: int, least: int, most: int) -> bool:
    """A power of two between these."""
    return least <= value <= most and not value & (value - 1)


def _corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(message, format="qed", structure="header", field=field, offset=offset)
