"""The header and table entries of qcow version 1. Big-endian; nobody specified it officially."""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.records import dataclass

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQBBHIQ")
SIZE = _HEADER.size
"""48 bytes."""
MAX_BACKING_NAME = 1023
MAX_L1_BYTES = (1 << 31) - 1

CRYPT_NONE, CRYPT_AES = 0, 1
COMPRESSED = 1 << 63


@dataclass(frozen=True)
class Header:
    size: int
    """Guest bytes."""
    cluster_bits: int
    l2_bits: int
    """Binary logarithm of the entries of an L2 table."""
    l1_offset: int
    crypt_method: int = CRYPT_NONE
    backing_offset: int = 0
    backing_length: int = 0

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        return 1 << self.l2_bits

    @property
    def l1_entries(self) -> int:
        return -(-self.size >> (self.cluster_bits + self.l2_bits))

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            1,
            self.backing_offset,
            self.backing_length,
            0,
            self.size,
            self.cluster_bits,
            self.l2_bits,
            0,
            self.crypt_method,
            self.l1_offset,
        )


def parse(data: bytes) -> Header:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""
    if len(data) < SIZE or data[:4] != MAGIC:
        raise _corrupt("Image not in qcow format", "magic", 0)
    fields = _HEADER.unpack_from(data)
    version, backing_offset, backing_length, _mtime, size, cluster_bits, l2_bits = fields[1:8]
    crypt, l1_offset = fields[9:]
    if version != 1:
        message = f"qcow (v1) does not support qcow version {version}"
        raise ImageUnsupported(
            message, format="qcow", structure="header", field="version", offset=4
        )
    if size <= 1:
        raise _corrupt("Image size is too small (must be at least 2 bytes)", "size", 24)
    if not 9 <= cluster_bits <= 16:
        raise _corrupt("Cluster size must be between 512 and 64k", "cluster_bits", 32)
    if not 6 <= l2_bits <= 13:
        raise _corrupt("L2 table size must be between 512 and 64k", "l2_bits", 33)
    if crypt not in (CRYPT_NONE, CRYPT_AES):
        raise _corrupt("invalid encryption method in qcow header", "crypt_method", 36)
    header = Header(
        size, cluster_bits, l2_bits, l1_offset, crypt, backing_offset, backing_length
    )
    if size > (1 << 63) - 1 or header.l1_entries * 8 > MAX_L1_BYTES:
        raise _corrupt("Image too large", "size", 24)
    if backing_offset and backing_length > MAX_BACKING_NAME:
        raise _corrupt("Backing file name too long", "backing_file_size", 16)
    return header


def compressed_entry(header: Header, host_offset: int, length: int) -> int:
    """Place and byte length of a compressed cluster as an L2 entry."""
    return COMPRESSED | length << (63 - header.cluster_bits) | host_offset


def compressed_place(header: Header, entry: int) -> tuple[int, int]:
    """(host offset, bytes) of a compressed cluster."""
    shift = 63 - header.cluster_bits
    return entry & ((1 << shift) - 1), entry >> shift & (header.cluster_size - 1)


def _corrupt(message: str, field: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(message, format="qcow", structure="header", field=field, offset=offset)
