"""The extensions behind the fixed fields of the header ("Header extensions").

Each is a type, a length and as many bytes, padded to a multiple of eight; the list ends with a type
of 0, where the backing file's name begins or where the first cluster ends.
"""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.fields import header_error, text_of
from lamina.records import dataclass
from lamina.units import round_up

EXT_END = 0x00000000
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

NAMES_NEED_MORE_THAN = 4096
"""Bytes of a cluster: QEMU writes no feature name table into smaller headers."""

MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""(word: 0 incompatible, 1 compatible, 2 autoclear; bit; name)"""


@dataclass
class BitmapsExtension:
    """Where the bitmap directory is ("Bitmaps extension")."""

    count: int
    directory_size: int
    directory_offset: int

    @classmethod
    def parse(
        cls, data: bytes, offset: int, cluster_size: int, *, maintained: bool
    ) -> BitmapsExtension:
        """``maintained``: the autoclear bit says that nobody without bitmap support wrote here."""

        def fail(message: str) -> ImageCorrupt:
            return header_error(message, "bitmaps", offset)

        if len(data) != 24:
            raise fail("bitmaps_ext: Invalid extension length")
        count, reserved, size, directory = struct.unpack(">IIQQ", data)
        if not maintained:
            # The fields cannot be relied upon.
            return cls(count, size, directory)
        if reserved:
            raise fail("bitmaps_ext: Reserved field is not zero")
        if count > MAX_BITMAPS:
            raise fail(
                f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum "
                f"of {MAX_BITMAPS}"
            )
        if count == 0:
            raise fail("found bitmaps extension with zero bitmaps")
        if directory % cluster_size:
            raise fail("bitmaps_ext: invalid bitmap directory offset")
        if size > MAX_BITMAP_DIRECTORY:
            raise fail(
                f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported "
                f"size ({MAX_BITMAP_DIRECTORY})"
            )
        return cls(count, size, directory)

    def pack(self) -> bytes:
        return struct.pack(">IIQQ", self.count, 0, self.directory_size, self.directory_offset)


@dataclass
class CryptoExtension:
    """Where the LUKS header is ("Full disk encryption header pointer")."""

    offset: int
    length: int

    @classmethod
    def parse(cls, data: bytes, offset: int, cluster_size: int) -> CryptoExtension:
        """``offset``: where the extension is, for messages."""
        if len(data) != 16:
            raise header_error(
                f"CRYPTO header extension size {len(data)}, but expected size 16",
                "encryption header",
                offset,
            )
        start, length = struct.unpack(">QQ", data)
        if start % cluster_size:
            raise header_error(
                f"Encryption header offset '{start}' is not a multiple of cluster size "
                f"'{cluster_size}'",
                "encryption header offset",
                offset,
            )
        return cls(start, length)

    def pack(self) -> bytes:
        return struct.pack(">QQ", self.offset, self.length)


def split_extensions(cluster: bytes, start: int, end: int) -> list[tuple[int, bytes, int]]:
    """(type, data, offset) of each extension up to the end marker."""
    found = []
    position = start
    while position < end:
        if position + 8 > end:
            raise header_error("Header extension too large", "extension", position)
        type, length = struct.unpack(">II", cluster[position : position + 8].ljust(8, b"\0"))
        if type == EXT_END:
            break
        position += 8
        if length > end - position:
            raise header_error("Header extension too large", "extension", position - 8)
        data = cluster[position : position + length].ljust(length, b"\0")
        found.append((type, data, position - 8))
        position += round_up(length, 8)
    return found


def pack_extension(type: int, data: bytes) -> bytes:
    return struct.pack(">II", type, len(data)) + data.ljust(round_up(len(data), 8), b"\0")


# -- the feature name table ("Feature name table") -----------------------------------------------


def pack_feature_names() -> bytes:
    return b"".join(
        bytes((word, bit)) + name.encode().ljust(46, b"\0") for word, bit, name in FEATURE_NAMES
    )


def incompatible_names(cluster: bytes, start: int, end: int) -> dict[int, str]:
    """Names of incompatible bits, as the image's own table has them; none if it cannot be read."""
    try:
        extensions = split_extensions(cluster, start, end)
    except ImageCorrupt:
        return {}
    names: dict[int, str] = {}
    for type, data, _ in extensions:
        if type == EXT_FEATURE_NAMES:
            for at in range(0, len(data) - 2, 48):
                if data[at] == 0 and data[at + 1] < 64:
                    text = text_of(data[at + 2 : at + 48].split(b"\0")[0])
                    names.setdefault(data[at + 1], text)
    return names


def describe_features(bits: int, names: dict[int, str]) -> str:
    """Incompatible features that nobody here knows, by the image's own names for them."""
    parts = []
    for bit in range(64):
        if bits >> bit & 1 and bit in names:
            parts.append(names[bit])
            bits &= ~(1 << bit)
    if bits:
        parts.append(f"Unknown incompatible feature: {bits:x}")
    return ", ".join(parts)
