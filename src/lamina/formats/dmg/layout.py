"""The trailer ("koly") and the block tables ("mish") of a UDIF image. Big-endian.

Apple never specified the format; see the documentation of libmodi, "Mac OS disk image types".
"""

from __future__ import annotations

import errno
import struct
import sys
from array import array
from itertools import compress
from operator import add, le

from lamina.errors import ImageCorrupt
from lamina.hints import NamedTuple, NoReturn
from lamina.records import dataclass, field
from lamina.units import SECTOR

SIGNATURE = b"koly"
TRAILER_SIZE = 512
_TRAILER = struct.Struct(">4sIII QQQQQ II 16s II 128s QQ 120x II 128s IQ 12x")
_TABLE = struct.Struct(">4sI QQQ II 24x II 128s I")
TABLE_HEADER_SIZE = _TABLE.size
"""204 bytes."""
CHUNK_SIZE = 40

ZERO, RAW, IGNORE = 0, 1, 2
ADC, ZLIB, BZIP2, LZFSE, LZMA = range(0x80000004, 0x80000009)
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF
UNREADABLE = 0xFFFFFFFD
"""Ours, for chunks that lie nowhere or whose type nobody knows."""
CODECS = {
    ADC: "adc",
    ZLIB: "zlib-stream",
    BZIP2: "bzip2",
    LZFSE: "lzfse",
    LZMA: "lzma",
    UNREADABLE: "unreadable",
}

MAX_CHUNK = 64 << 20
"""Bytes of an encoded chunk, before and after decoding: what QEMU accepts as well."""
MAX_SECTOR = 1 << 54
CRC32 = 2
"""The type of checksum that images have nowadays."""


@dataclass(frozen=True)
class Checksum:
    type: int = 0
    """0: there is none."""
    bits: int = 0
    value: bytes = b""

    @property
    def crc32(self) -> int | None:
        """None for other kinds."""
        if self.type != CRC32 or self.bits != 32:
            return None
        return int.from_bytes(self.value[:4], "big")


@dataclass(frozen=True)
class Trailer:
    """Offsets and lengths in bytes."""

    sectors: int
    """Of the disk."""
    data_offset: int = 0
    data_length: int = 0
    resource_offset: int = 0
    resource_length: int = 0
    plist_offset: int = 0
    plist_length: int = 0
    data_checksum: Checksum = Checksum()
    master_checksum: Checksum = Checksum()
    """Over the checksums of all block tables."""
    segments: int = 1


def find_trailer(tail: bytes) -> int:
    """Where in the last bytes of a file the trailer begins; something may follow it.

    Raises ImageCorrupt.
    """
    if len(tail) < TRAILER_SIZE:
        raise ImageCorrupt("dmg file must be at least 512 bytes long", format="dmg")
    at = tail.rfind(SIGNATURE, 0, len(tail) - TRAILER_SIZE + len(SIGNATURE))
    if at < 0:
        raise ImageCorrupt(
            "Could not locate UDIF trailer in dmg file", format="dmg", structure="trailer"
        )
    return at


def parse_trailer(data: bytes, offset: int) -> Trailer:
    """``data``: the 512 bytes at ``offset`` of the file. Raises ImageCorrupt."""
    fields = _TRAILER.unpack(data)
    data_offset, data_length, resource_offset, resource_length = fields[5:9]
    segments = fields[10]
    data_checksum = Checksum(*fields[12:15])
    plist_offset, plist_length = fields[15:17]
    master_checksum = Checksum(*fields[17:20])
    sectors = fields[21]
    if data_offset > offset:
        _bad("data fork", "offset", offset + 24)
    for start, length, name, place in (
        (resource_offset, resource_length, "resource fork", 40),
        (plist_offset, plist_length, "property list", 216),
    ):
        if length and start + length > offset:
            _bad(name, "offset", offset + place)
    if sectors > MAX_SECTOR:
        raise ImageCorrupt(
            "File too large",
            format="dmg",
            structure="trailer",
            field="sector count",
            offset=offset + 492,
            errno=errno.EFBIG,
        )
    return Trailer(
        sectors,
        data_offset,
        data_length,
        resource_offset,
        resource_length,
        plist_offset,
        plist_length,
        data_checksum,
        master_checksum,
        segments,
    )


def _bad(name: str, field: str, offset: int) -> NoReturn:
    raise ImageCorrupt(
        f"The {name} lies behind the end of the image",
        format="dmg",
        structure="trailer",
        field=f"{name} {field}",
        offset=offset,
    )


class Chunks(NamedTuple):
    """Runs of the disk, as columns. Figures in bytes."""

    type: array[int]
    guest_offset: array[int]
    length: array[int]
    host_offset: array[int]
    stored: array[int]
    """Bytes at ``host_offset``."""

    @classmethod
    def none(cls) -> Chunks:
        return cls(array("I"), *(array("Q") for _ in range(4)))

    def extend(self, other: Chunks) -> None:
        for mine, more in zip(self, other, strict=True):
            mine.extend(more)

    def in_order(self) -> Chunks:
        """Sorted by guest offset. Raises ImageCorrupt where two overlap."""
        found = self
        starts = self.guest_offset
        if not all(map(le, starts, starts[1:])):
            order = sorted(range(len(starts)), key=starts.__getitem__)
            found = Chunks(
                *(array(one.typecode, map(one.__getitem__, order)) for one in self)
            )
        ends = map(add, found.guest_offset, found.length)
        for number, (end, start) in enumerate(zip(ends, found.guest_offset[1:], strict=False)):
            if end > start:
                raise ImageCorrupt(
                    f"Chunks {number} and {number + 1} hold the same sectors",
                    format="dmg",
                    structure="block table",
                )
        return found


@dataclass(frozen=True)
class BlockTable:
    """One ``mish`` table, which describes a partition."""

    first_sector: int
    sectors: int
    data_offset: int
    """Added to the offsets of its chunks, as is the offset of the data fork."""
    checksum: Checksum
    chunks: Chunks
    unknown: list[int] = field(default_factory=list)
    """Types of chunks that nobody knows, each once."""


def parse_table(data: bytes, number: int, base: int, end: int) -> BlockTable | None:
    """A resource as a block table; None if it is something else.

    ``number``: of the chunks in the tables before it, for messages. ``base``: where the data fork
    begins; ``end``: where the trailer does, behind which there is no data. Raises ImageCorrupt.
    """
    if len(data) < TABLE_HEADER_SIZE + CHUNK_SIZE or not data.startswith(b"mish"):
        return None
    fields = _TABLE.unpack_from(data)
    first, sectors, data_offset = fields[2:5]
    checksum = Checksum(*fields[7:10])
    count = fields[10]
    count = min(count, (len(data) - TABLE_HEADER_SIZE) // CHUNK_SIZE)
    rows = data[TABLE_HEADER_SIZE : TABLE_HEADER_SIZE + count * CHUNK_SIZE]
    types = _numbers("I", rows)[0::10]
    numbers = _numbers("Q", rows)
    starts, counts, offsets, lengths = (numbers[column::5] for column in range(1, 5))
    # Some are there in name only.
    real = [kind not in (COMMENT, END) and size for kind, size in zip(types, counts, strict=True)]
    if not all(real):
        types = array("I", compress(types, real))
        starts, counts, offsets, lengths = (
            array("Q", compress(column, real)) for column in (starts, counts, offsets, lengths)
        )
    if types and max(starts) + max(counts) + first > MAX_SECTOR:
        raise ImageCorrupt(
            f"A chunk behind number {number} ends behind any disk",
            format="dmg",
            structure="block table",
            field="sector",
        )
    unknown = _place(types, counts, offsets, lengths, number, base + data_offset, end)
    return BlockTable(
        first,
        sectors,
        data_offset,
        checksum,
        Chunks(
            types,
            array("Q", [SECTOR * (first + start) for start in starts]),
            array("Q", [SECTOR * size for size in counts]),
            offsets,
            lengths,
        ),
        unknown,
    )


def _place(
    types: array[int],
    counts: array[int],
    offsets: array[int],
    lengths: array[int],
    number: int,
    base: int,
    end: int,
) -> list[int]:
    """Turn the offsets of chunks into those of the file; refuse chunks that are too large, and mark
    as unreadable those that lie nowhere. Returns the types that nobody knows.
    """
    unknown: dict[int, None] = {}
    for index, kind in enumerate(types):
        if kind in (ZERO, IGNORE):
            offsets[index] = lengths[index] = 0
            continue
        count, length = counts[index], lengths[index]
        offset = base + offsets[index]
        readable = offset + length <= end
        if kind == RAW:
            readable &= length >= count * SECTOR
        elif kind not in CODECS or kind == UNREADABLE:
            unknown[kind] = None
            readable = False
        elif length > MAX_CHUNK:
            _too_large("length", length, number + index, MAX_CHUNK)
        elif count > MAX_CHUNK // SECTOR:
            _too_large("sector count", count, number + index, MAX_CHUNK // SECTOR)
        if readable:
            offsets[index] = offset
        else:
            types[index] = UNREADABLE
            offsets[index] = lengths[index] = 0
    return list(unknown)


def _too_large(field: str, value: int, chunk: int, most: int) -> NoReturn:
    raise ImageCorrupt(
        f"{field} {value} for chunk {chunk} is larger than max ({most})",
        format="dmg",
        structure="block table",
        field=field,
    )


def _numbers(typecode: str, data: bytes) -> array[int]:
    found = array(typecode, data)
    if sys.byteorder == "little":
        found.byteswap()
    return found
