"""Persistent bitmaps on disk: bytes to dataclasses and back ("Bitmaps", "Bitmap directory",
"Bitmap table", "Dirty tracking bitmaps"). Nothing here does I/O; all offsets and sizes are bytes.

The header's extension names the directory, an entry of the directory a table, and each entry of a
table a cluster of bits. Bit ``n`` stands for the granule ``n`` of the disk; in its byte the lowest
bit comes first.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections.abc import Iterable, Iterator

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.qcow2.layout import MAX_OFFSET
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.units import MIB, round_up

if TYPE_CHECKING:
    from lamina.formats.qcow2.layout import Header

TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00
TABLE_RESERVED = 0xFF000000000001FE
TABLE_ALL_ONES = 1
"""An entry that names no cluster: all of its bits are set. 0: none is."""

MAX_TABLE = 0x8000000
"""Entries."""
MAX_BITS = 512 * MIB
"""Bytes of one bitmap."""
MAX_NAME = 1023
"""Bytes."""
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31

IN_USE = 1
"""Not stored since somebody began to change it: what is in the file is not to be relied upon."""
AUTO = 2
"""It records."""
_FLAGS = IN_USE | AUTO
"""The third one says that unknown extra data may be ignored: none is supported, as in QEMU."""

TYPE_DIRTY = 1

_ENTRY = struct.Struct(">QIIBBHI")
FLAGS_FIELD = 12
"""Where in an entry its 32 bits of flags are."""


@dataclass
class BitmapEntry:
    """One entry of the bitmap directory."""

    name: str
    table_offset: int
    table_size: int
    """Entries."""
    flags: int
    granularity_bits: int
    type: int = TYPE_DIRTY

    @property
    def granularity(self) -> int:
        """Guest bytes per bit."""
        return 1 << self.granularity_bits

    @property
    def length(self) -> int:
        """Bytes of the entry."""
        return round_up(_ENTRY.size + len(_bytes(self.name)), 8)

    def describe(self) -> dict[str, Any]:
        """In the words of QEMU's ``info``."""
        names = {IN_USE: "in-use", AUTO: "auto"}
        flags = [name for flag, name in names.items() if self.flags & flag]
        return {"flags": flags, "name": self.name, "granularity": self.granularity}


def parse_directory(directory: bytes, count: int) -> Iterator[BitmapEntry]:
    """Exactly ``count`` entries that fill ``directory``, one by one.

    Raises ImageCorrupt where there is none, ImageUnsupported for one with extra data. Whether an
    entry suits the image is for ``check_entry`` to say.
    """
    if not directory:
        raise _error("Requested bitmap directory size is zero", 0, 0)
    index = position = 0
    while position < len(directory):
        if position + _ENTRY.size > len(directory):
            raise _error("Broken bitmap directory", index, position)
        offset, size, flags, type, granularity, name_size, extra_size = _ENTRY.unpack_from(
            directory, position
        )
        if extra_size:
            raise ImageUnsupported(
                "Bitmap extra data is not supported",
                format="qcow2",
                structure="bitmap directory",
                offset=position,
            )
        start = position + _ENTRY.size
        end = start + name_size
        if round_up(end, 8) > len(directory):
            raise _error("Broken bitmap directory", index, position)
        if index >= count:
            raise _error("More bitmaps found than specified in header extension", index, position)
        name = directory[start:end].decode("utf-8", "surrogateescape")
        yield BitmapEntry(name, offset, size, flags, granularity, type)
        position = round_up(end, 8)
        index += 1
    if index < count:
        raise _error("Less bitmaps found than specified in header extension", index, position)


def check_entry(entry: BitmapEntry, index: int, header: Header) -> None:
    """Raises ImageCorrupt, in QEMU's words, for an entry that cannot be one of this image."""
    table_bytes = entry.table_size << header.cluster_bits
    fits = (
        0 < len(_bytes(entry.name)) <= MAX_NAME
        and "\0" not in entry.name
        and entry.table_offset
        and entry.table_offset % header.cluster_size == 0
        and 0 < entry.table_size <= MAX_TABLE
        and table_bytes <= MAX_BITS
        and not entry.flags & ~_FLAGS
        and entry.type == TYPE_DIRTY
        and MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
        # A bitmap in use may not have followed a resize.
        and (entry.flags & IN_USE or bitmap_bytes(header.size, entry.granularity) <= table_bytes)
    )
    if not fits:
        shown = entry.name.split("\0")[0]
        raise _error(f"Bitmap '{shown}' doesn't satisfy the constraints", index, 0)


def check_loadable(entry: BitmapEntry, index: int, header: Header) -> None:
    """The same for what only matters to who reads the bits of a bitmap that is not in use."""
    if entry.table_offset + entry.table_size * 8 > MAX_OFFSET:
        raise _error(_UNREADABLE_TABLE.format(entry.name, "Input/output error"), index, 0)
    if entry.table_size != table_entries(header, entry.granularity):
        raise _error(
            f"Could not read bitmap '{entry.name}' from image: Invalid argument", index, 0
        )


_UNREADABLE_TABLE = "Could not read bitmap_table table from image for bitmap '{}': {}"


def check_table(table: array[int], entry: BitmapEntry, header: Header) -> None:
    """Raises ImageCorrupt if an entry of the table of this bitmap breaks the rules."""
    forbidden = TABLE_RESERVED | (header.cluster_size - 1 & ~TABLE_ALL_ONES)
    for index, word in enumerate(table):
        if word & forbidden or (word & TABLE_ALL_ONES and word != TABLE_ALL_ONES):
            raise ImageCorrupt(
                _UNREADABLE_TABLE.format(entry.name, "Invalid argument"),
                format="qcow2",
                structure="bitmap table",
                field=f"entry {index}",
                offset=entry.table_offset + index * 8,
                errno=errno.EINVAL,
            )


def bitmap_bytes(size: int, granularity: int) -> int:
    """Bytes of a bitmap for a disk of ``size`` bytes."""
    return -(-size // (granularity * 8))


def table_entries(header: Header, granularity: int) -> int:
    """Entries of the table of a bitmap for this image."""
    return -(-bitmap_bytes(header.size, granularity) // header.cluster_size)


def pack_directory(entries: Iterable[BitmapEntry]) -> bytes:
    return b"".join(_pack(entry) for entry in entries)


def _pack(entry: BitmapEntry) -> bytes:
    name = _bytes(entry.name)
    fixed = _ENTRY.pack(
        entry.table_offset,
        entry.table_size,
        entry.flags,
        entry.type,
        entry.granularity_bits,
        len(name),
        0,
    )
    return (fixed + name).ljust(entry.length, b"\0")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _error(message: str, index: int, offset: int) -> ImageCorrupt:
    return ImageCorrupt(
        message,
        format="qcow2",
        structure="bitmap directory",
        field=f"entry {index}",
        offset=offset,
        errno=errno.EINVAL,
    )
