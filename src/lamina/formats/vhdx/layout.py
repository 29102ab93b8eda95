"""Headers, region tables and BAT entries of VHDX: bytes and dataclasses. Little-endian.

The numbers in brackets are sections of [MS-VHDX]. All functions are pure; errors name the structure
and the field. Metadata items are in ``metadata``, the log in ``log``, the parent locator in
``locator``.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

from lamina.codecs.crc32c import crc32c
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.records import dataclass
from lamina.units import KIB, MIB

# -- the header section [2.2] ----------------------------------------------------------------------

FILE_SIGNATURE = b"vhdxfile"
CREATOR = "Lamina"
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_BYTES = 4 * KIB
REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
REGION_TABLE_BYTES = 64 * KIB
HEADER_SECTION = MIB
"""Bytes at the start of the file that hold nothing else."""
MAX_ENTRIES = 2047
"""Of a region table and of a metadata table."""

NO_GUID = bytes(16)
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGIONS = struct.Struct("<4sIII")
_REGION = struct.Struct("<16sQII")

# -- BAT entries [2.5.1] ---------------------------------------------------------------------------

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 6, 7
RESERVED, UNMAPPED_OLD = 4, 5
"""The latter meant "unmapped" in drafts of the format."""
READ_ZERO = (UNDEFINED, ZERO, UNMAPPED, UNMAPPED_OLD)
BITMAP_PRESENT = 6
STATE = 7
OFFSET = ~(MIB - 1) & ((1 << 64) - 1)
"""Of the file offset in an entry."""


def guid(text: str) -> bytes:
    """A GUID as stored: its first three fields are little-endian. Raises ValueError."""
    plain = bytes.fromhex(text.strip("{}").replace("-", ""))
    if len(plain) != 16:
        raise ValueError(f"no GUID: {text}")
    return plain[3::-1] + plain[5:3:-1] + plain[7:5:-1] + plain[8:]


def guid_text(stored: bytes) -> str:
    plain = stored[3::-1] + stored[5:3:-1] + stored[7:5:-1] + stored[8:]
    return "-".join(plain[start:end].hex() for start, end in _GUID_FIELDS)


_GUID_FIELDS = ((0, 4), (4, 6), (6, 8), (8, 10), (10, 16))


def new_guid() -> bytes:
    """A random one (version 4)."""
    plain = bytearray(os.urandom(16))
    plain[7] = plain[7] & 0x0F | 0x40
    plain[8] = plain[8] & 0x3F | 0x80
    return bytes(plain)


BAT_REGION = guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")


def file_identifier() -> bytes:
    """[2.2.1]: the signature, and who made the file."""
    return (FILE_SIGNATURE + CREATOR.encode("utf-16-le")).ljust(8 + 512, b"\0")


@dataclass(frozen=True)
class Header:
    """[2.2.2]: which log there is, and whether anything has changed since somebody last looked."""

    sequence: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    """All zeroes: the log is empty."""
    log_offset: int
    log_length: int
    log_version: int = 0

    def pack(self) -> bytes:
        packed = _HEADER.pack(
            b"head",
            0,
            self.sequence,
            self.file_write_guid,
            self.data_write_guid,
            self.log_guid,
            self.log_version,
            1,
            self.log_length,
            self.log_offset,
        )
        return with_checksum(packed.ljust(HEADER_BYTES, b"\0"))


def parse_header(data: bytes) -> Header | None:
    """None: this one is not valid, as after a crash while it was written."""
    if len(data) < HEADER_BYTES or data[:4] != b"head":
        return None
    _, _, sequence, file_write, data_write, log, log_version, version, length, offset = (
        _HEADER.unpack_from(data)
    )
    if version != 1 or not checksum_fits(data[:HEADER_BYTES]):
        return None
    return Header(sequence, file_write, data_write, log, offset, length, log_version)


def current_header(headers: tuple[Header | None, Header | None]) -> int:
    """Which of the two is in force. Raises ImageCorrupt."""
    first, second = headers
    if first is None and second is None:
        raise corrupt("No valid VHDX header found", "header", "Checksum", HEADER_OFFSETS[0])
    if first is None or second is None:
        return 0 if second is None else 1
    if first.sequence == second.sequence and first != second:
        raise corrupt(
            "Both VHDX headers have the same sequence number but differ",
            "header",
            "SequenceNumber",
            HEADER_OFFSETS[0] + 8,
        )
    return 0 if first.sequence > second.sequence else 1


def check_log(header: Header, file_size: int, *, used: bool) -> None:
    """Raises ImageUnsupported or ImageCorrupt for a log that cannot be.

    ``used``: it will be written, so its place matters though it is empty.
    """
    if header.log_version != 0:
        raise ImageUnsupported(
            f"VHDX log version {header.log_version} is not supported",
            format="vhdx",
            structure="header",
            field="LogVersion",
        )
    if header.log_guid == NO_GUID and not used:
        return
    offset, length = header.log_offset, header.log_length
    if offset % MIB or length % MIB or not length or offset < HEADER_SECTION:
        raise corrupt(
            f"The VHDX log at {offset}, {length} bytes long, is not aligned to 1 MiB or lies "
            "within the headers",
            "header",
            "LogOffset",
        )
    if offset + length > file_size:
        raise corrupt(
            f"The VHDX log at {offset}, {length} bytes long, points after end of file "
            f"({file_size})",
            "header",
            "LogLength",
        )


# -- regions [2.2.3] -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    guid: bytes
    offset: int
    length: int
    required: bool = True


def pack_regions(regions: list[Region]) -> bytes:
    packed = _REGIONS.pack(b"regi", 0, len(regions), 0)
    for region in regions:
        packed += _REGION.pack(region.guid, region.offset, region.length, region.required)
    return with_checksum(packed.ljust(REGION_TABLE_BYTES, b"\0"))


def parse_regions(data: bytes) -> list[Region]:
    """Raises ImageCorrupt, ImageUnsupported."""
    if len(data) < REGION_TABLE_BYTES or data[:4] != b"regi":
        raise corrupt("The VHDX region table has no signature", "region table", "Signature")
    if not checksum_fits(data):
        raise corrupt("The checksum of the VHDX region table is wrong", "region table", "Checksum")
    count = _REGIONS.unpack_from(data)[2]
    if count > MAX_ENTRIES:
        raise corrupt(
            f"The VHDX region table has {count} entries, more than {MAX_ENTRIES}",
            "region table",
            "EntryCount",
        )
    regions = []
    for number in range(count):
        name, offset, length, flags = _REGION.unpack_from(data, _REGIONS.size + 32 * number)
        if offset % MIB or length % MIB or not length or offset < HEADER_SECTION:
            raise corrupt(
                f"VHDX region {offset}-{offset + length} is not aligned to 1 MiB or lies within "
                "the headers",
                "region table",
                f"entry {number}",
            )
        regions.append(Region(name, offset, length, bool(flags & 1)))
    check_regions(regions)
    return regions


def check_regions(regions: list[Region]) -> None:
    """The two known ones must be there once, and none may overlap another."""
    for region in regions:
        if region.guid not in (BAT_REGION, METADATA_REGION) and region.required:
            raise ImageUnsupported(
                f"VHDX region {guid_text(region.guid)} is not supported",
                format="vhdx",
                structure="region table",
            )
    for name, what in ((BAT_REGION, "BAT"), (METADATA_REGION, "metadata")):
        count = sum(region.guid == name for region in regions)
        if count != 1:
            raise corrupt(
                f"The VHDX region table names {count} {what} regions", "region table", "Guid"
            )
    check_apart([(region.offset, region.offset + region.length) for region in regions])


def check_apart(spans: list[tuple[int, int]]) -> None:
    """Raises ImageCorrupt if any of these (start, end) overlap."""
    ordered = sorted(spans)
    for before, behind in pairwise(ordered):
        if behind[0] < before[1]:
            raise corrupt(
                f"VHDX region {behind[0]}-{behind[1]} overlaps with region "
                f"{before[0]}-{before[1]}.",
                "region table",
                "FileOffset",
            )


# -- checksums -------------------------------------------------------------------------------------


def with_checksum(data: bytes) -> bytes:
    """``data`` with its CRC-32C in bytes 4 to 7, which count as zeroes."""
    blank = data[:4] + bytes(4) + data[8:]
    return data[:4] + struct.pack("<I", crc32c(blank)) + data[8:]


def checksum_fits(data: bytes) -> bool:
    return with_checksum(data)[4:8] == data[4:8]


def corrupt(
    message: str, structure: str, field: str, offset: int | None = None
) -> ImageCorrupt:
    return ImageCorrupt(message, format="vhdx", structure=structure, field=field, offset=offset)
