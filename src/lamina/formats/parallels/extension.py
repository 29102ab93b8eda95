"""The format extension: a cluster of features, of which dirty bitmaps are the only kind known.

    magic u64, MD5 of everything from byte 24 to the end of the cluster, and then, at multiples of 8
    bytes, features: magic u64, flags u64, bytes of data u32, unused u32, data; ended by magic 0

A bitmap: sectors of the disk u64, UUID, sectors of a bit u32, entries u32, and as many u64: the
sector at which a cluster of its bits is kept, or 0 or 1 where all of them are.
"""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.parallels.layout import Header
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.bitset import Bitset
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.node import Node

MAGIC = 0xAB234CEF23DCEA87
DIRTY_BITMAP = 0x20385FAE252CB34A
NECESSARY, TRANSIT = 1, 2
_HEAD = struct.Struct("<Q16s")
_FEATURE = struct.Struct("<QQII")
_BITMAP = struct.Struct("<Q16sII")
MAX_CLUSTER = 64 << 20
"""Bytes of a cluster beyond which its extension is not read: usual are 1 MiB and less."""
MAX_BITMAP = 256 << 20
"""Bytes of a bitmap. Room for the bits of 128 TiB in pieces of 64 KiB."""
_MAX_BITMAPS = 1000


@dataclass(frozen=True)
class BitmapFeature:
    name: str
    """Its UUID."""
    granularity: int
    """Bytes of the disk for each bit."""
    places: tuple[int, ...]
    """For every cluster of bits: 0 and 1 if all are, otherwise the sector where it is."""


@dataclass(frozen=True)
class Extension:
    bitmaps: tuple[BitmapFeature, ...]
    necessary: bool
    """Whoever changes the image must know some feature that is unknown here."""
    kept: bytes = b""
    """Features that are unknown here and stay as they are when the image is changed."""

    def places(self, header: Header) -> list[int]:
        """Host offsets of the clusters that belong to it, its own first."""
        found = [header.extension_sector * SECTOR]
        for bitmap in self.bitmaps:
            found += [place * SECTOR for place in bitmap.places if place > 1]
        return found


def read_extension(file: Node, header: Header) -> Extension:
    """Raises ImageCorrupt or ImageUnsupported."""
    offset, length = header.extension_sector * SECTOR, header.cluster_size
    if length > MAX_CLUSTER:
        raise ImageUnsupported(
            f"Format Extension of {length} bytes is not read", format="parallels"
        )
    if offset + length > file.size:
        raise _corrupt("Format Extension lies behind the end of the image", offset)
    return parse_extension(file.read(offset, length), header)


def parse_extension(data: bytes, header: Header) -> Extension:
    from hashlib import md5

    offset = header.extension_sector * SECTOR
    if len(data) < _HEAD.size + _FEATURE.size:
        raise _corrupt("Format Extension is too short", offset)
    magic, checksum = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise _corrupt(
            f"Wrong parallels Format Extension magic: {magic:#x}, expected: {MAGIC:#x}", offset
        )
    if md5(data[_HEAD.size :], usedforsecurity=False).digest() != checksum:
        raise _corrupt(
            "Wrong checksum in Format Extension header. Format extension is corrupted.", offset + 8
        )
    bitmaps: list[BitmapFeature] = []
    necessary = False
    kept = b""
    at = _HEAD.size
    while True:
        if at + _FEATURE.size > len(data):
            raise _corrupt("Format Extension has no end", offset + at)
        feature, flags, size, _ = _FEATURE.unpack_from(data, at)
        if feature == 0:
            return Extension(tuple(bitmaps), necessary, kept)
        start = at
        at += _FEATURE.size
        if at + size > len(data):
            raise _corrupt("Feature of Format Extension ends behind its end", offset + at)
        if feature == DIRTY_BITMAP:
            bitmaps.append(_parse_bitmap(data[at : at + size], header, offset + at))
            if len(bitmaps) > _MAX_BITMAPS:
                raise _corrupt(f"There are more than {_MAX_BITMAPS} bitmaps", offset + at)
        elif flags & NECESSARY:
            necessary = True
        at += -(-size // 8) * 8
        if feature != DIRTY_BITMAP and flags & TRANSIT:
            kept += data[start:at]


def pack_extension(features: bytes, cluster_size: int) -> bytes:
    """A cluster of these features."""
    from hashlib import md5

    body = features.ljust(cluster_size - _HEAD.size, b"\0")
    return _HEAD.pack(MAGIC, md5(body, usedforsecurity=False).digest()) + body


def _parse_bitmap(data: bytes, header: Header, offset: int) -> BitmapFeature:
    import uuid

    if len(data) < _BITMAP.size:
        raise _corrupt("Dirty bitmap is too short", offset)
    sectors, identity, granularity, entries = _BITMAP.unpack_from(data)
    if sectors != header.sectors:
        raise _corrupt(
            f"Bitmap size (in sectors) {sectors} differs from disk size in sectors "
            f"{header.sectors}",
            offset,
        )
    if granularity == 0 or granularity & (granularity - 1):
        raise _corrupt(f"Bitmap granularity {granularity} is not a power of two", offset + 24)
    total = _bitmap_bytes(header, granularity * SECTOR)
    if total > MAX_BITMAP:
        raise ImageUnsupported(f"Bitmap of {total} bytes is not read", format="parallels")
    needed = -(-total // header.cluster_size)
    if entries != needed or _BITMAP.size + 8 * entries > len(data):
        raise _corrupt(f"Bitmap has {entries} entries, and needs {needed}", offset + 28)
    places = struct.unpack_from(f"<{entries}Q", data, _BITMAP.size)
    return BitmapFeature(str(uuid.UUID(bytes=identity)), granularity * SECTOR, places)


def dirty_bitmap(file: Node, header: Header, feature: BitmapFeature) -> DirtyBitmap:
    """For the node: it does not record, and its bits are read when somebody looks at them."""
    from lamina.block.dirty import DirtyBitmap

    def load(bits: Bitset) -> None:
        total = _bitmap_bytes(header, feature.granularity)
        for number, place in enumerate(feature.places):
            position = number * header.cluster_size
            length = min(header.cluster_size, total - position)
            if place == 1:
                bits.load_ones(position, length)
            elif place > 1:
                if place * SECTOR + length > file.size:
                    raise _corrupt("Bits of a bitmap lie behind the end of the image", place)
                bits.load(position, file.read(place * SECTOR, length))

    return DirtyBitmap(
        feature.name,
        header.size,
        feature.granularity,
        enabled=False,
        persistent=True,
        load=load,
    )


def _bitmap_bytes(header: Header, granularity: int) -> int:
    granules = -(-header.size // granularity)
    return -(-granules // 8)


def _corrupt(message: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(
        message, format="parallels", structure="format extension", offset=offset
    )
