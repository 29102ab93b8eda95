"""The log of VHDX [2.3]: a ring of entries, each a group of 4 KiB writes that happens as a whole.

    entry header     64 bytes: checksum, length, tail, sequence number, descriptor count, GUID, …
    descriptors      32 bytes each: "this sector goes there", "so many bytes there become zero"
    data sectors     4 KiB each, the first 8 and last 4 bytes of which are in their descriptor

Descriptors begin in the sector of the header and fill whole sectors. An entry may run over the end
of the ring. The functions here are pure; ``Log`` writes, ``replay`` finds and applies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from lamina.block.extents import Kind
from lamina.engine.metadata import DirtyWrite
from lamina.errors import ImageCorrupt
from lamina.formats.vhdx.layout import checksum_fits, with_checksum
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.units import MIB, round_down, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vhdx.headers import Headers
    from lamina.formats.vhdx.layout import Header

SECTOR = 4096
"""Bytes of a log sector, and the granularity of what is logged."""
_ENTRY = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = struct.Struct("<4s4s8sQQ")
_MOST_SECTORS = (SECTOR - _ENTRY.size) // _DESCRIPTOR.size
"""That one of our entries changes. The format allows more, but QEMU refuses entries whose
descriptors fill more than the sector of the header. Half of the smallest log."""
FIRST_TARGET = 192 << 10
"""The region tables and all that follows may be logged, the headers may not."""


class EntryHeader(NamedTuple):
    length: int
    """Bytes of the whole entry."""
    tail: int
    """Where in the log the oldest entry begins that is still needed."""
    sequence: int
    descriptors: int
    guid: bytes
    flushed_size: int
    """The file was at least so long when the entry was written: a shorter one was cut."""
    last_size: int
    """Everything in the file lies before this."""

    @property
    def descriptor_bytes(self) -> int:
        """Of the header and the descriptors: whole sectors."""
        return round_up(_ENTRY.size + _DESCRIPTOR.size * self.descriptors, SECTOR)


class Change(NamedTuple):
    """What a descriptor asks for."""

    offset: int
    """In the file."""
    length: int
    data: bytes | None
    """None: zeroes."""


def parse_entry_header(sector: bytes | memoryview) -> EntryHeader | None:
    """None: no entry can begin here."""
    if len(sector) < _ENTRY.size:
        return None
    fields = _ENTRY.unpack_from(sector)
    signature, _, length, tail, sequence, descriptors, _, guid, flushed, last = fields
    header = EntryHeader(length, tail, sequence, descriptors, guid, flushed, last)
    if signature != b"loge" or not sequence or length % SECTOR or tail % SECTOR:
        return None
    return header if header.descriptor_bytes <= length else None


def parse_entry(entry: bytes) -> list[Change] | None:
    """What a whole entry says; None: it was not written to its end."""
    header = parse_entry_header(entry)
    if header is None or len(entry) != header.length:
        return None
    changes: list[Change] = []
    at = header.descriptor_bytes
    for number in range(header.descriptors):
        place = _ENTRY.size + _DESCRIPTOR.size * number
        signature, trailing, leading, offset, sequence = _DESCRIPTOR.unpack_from(entry, place)
        if sequence != header.sequence:
            return None
        if signature == b"zero":
            changes.append(Change(offset, int.from_bytes(leading, "little"), None))
            continue
        sector = entry[at : at + SECTOR]
        at += SECTOR
        if signature != b"desc" or not _belongs(sector, sequence):
            return None
        changes.append(Change(offset, SECTOR, leading + sector[8:-4] + trailing))
    return changes if at == len(entry) and checksum_fits(entry) else None


def _belongs(sector: bytes, sequence: int) -> bool:
    return (
        len(sector) == SECTOR
        and sector[:4] == b"data"
        and sector[4:8] == (sequence >> 32).to_bytes(4, "little")
        and sector[-4:] == (sequence & 0xFFFFFFFF).to_bytes(4, "little")
    )


def pack_entry(
    changes: Sequence[Change],
    *,
    sequence: int,
    tail: int,
    guid: bytes,
    flushed_size: int,
    last_size: int,
) -> bytes:
    """The bytes of an entry."""
    descriptors: list[bytes] = []
    sectors: list[bytes] = []
    high, low = struct.pack("<I", sequence >> 32), struct.pack("<I", sequence & 0xFFFFFFFF)
    for offset, length, data in changes:
        if data is None:
            size = length.to_bytes(8, "little")
            descriptors.append(_DESCRIPTOR.pack(b"zero", bytes(4), size, offset, sequence))
            continue
        descriptors.append(_DESCRIPTOR.pack(b"desc", data[-4:], data[:8], offset, sequence))
        sectors.append(b"data" + high + data[8:-4] + low)
    head = round_up(_ENTRY.size + _DESCRIPTOR.size * len(changes), SECTOR)
    length = head + SECTOR * len(sectors)
    header = _ENTRY.pack(
        b"loge",
        0,
        length,
        tail,
        sequence,
        len(changes),
        0,
        guid,
        flushed_size,
        last_size,
    )
    return with_checksum((header + b"".join(descriptors)).ljust(head, b"\0") + b"".join(sectors))


def check_targets(changes: Sequence[Change], *, log: tuple[int, int], end: int) -> None:
    """Raises ImageCorrupt for changes of what no log may change. ``end``: of the file."""
    for offset, length, _ in changes:
        inside = offset >= FIRST_TARGET and offset + length <= end
        aligned = not (offset | length) % SECTOR
        if not (inside and aligned) or (offset < log[1] and log[0] < offset + length):
            raise ImageCorrupt(
                f"The VHDX log changes {length} bytes at {offset}, where it may not",
                format="vhdx",
                structure="log entry",
                field="FileOffset",
                offset=offset,
            )


# -- writing ---------------------------------------------------------------------------------------


def hold(file: Node, header: Header) -> None:
    """See to it that the file has room for the longest of our entries, while the log is empty: a
    flush shall not be the first to see that there is none."""
    length = min((1 + _MOST_SECTORS) * SECTOR, header.log_length)
    if any(extent.kind is Kind.ZERO for extent in file.extents(header.log_offset, length)):
        file.write_zeroes(header.log_offset, length)


class Log:
    """Writes entries; a ``WriteAheadLog`` of the engine.

    Whenever an entry is added, all before it are carried out and durable. So each one overwrites
    the one before, and a crash leaves one valid entry or none: QEMU, for one, carries out entries
    of which the tail says that they are no longer needed, and forgets some that are.
    """

    def __init__(self, file: Node, headers: Headers) -> None:
        """The headers name the log that begins here."""
        self.file = file
        self._headers = headers
        self._guid = headers.current.log_guid
        self._sequence = 0

    def groups(self, writes: Sequence[DirtyWrite]) -> Iterator[list[DirtyWrite]]:
        """The writes in groups that fit into an entry; long ones are cut."""
        group: list[DirtyWrite] = []
        room = _MOST_SECTORS * SECTOR
        for offset, data, event, _ in writes:
            if (offset | len(data)) % SECTOR:
                raise ValueError(f"{len(data)} bytes at {offset} are not whole sectors")
            view = memoryview(data)
            while view:
                part = view[:room]
                group.append(DirtyWrite(offset, part, event))
                offset += len(part)
                room -= len(part)
                view = view[len(part) :]
                if not room:
                    yield group
                    group, room = [], _MOST_SECTORS * SECTOR
        if group:
            yield group

    def append(self, writes: Sequence[DirtyWrite]) -> None:
        """Write one entry; it counts once the file has been flushed."""
        headers = self._headers
        if not headers.certain or headers.current.log_guid != self._guid:
            # Closing the log failed half-way, and the image is still in use.
            headers.update(log_guid=self._guid)
        changes = [
            Change(offset + skip, SECTOR, bytes(data[skip : skip + SECTOR]))
            for offset, data, _, _ in writes
            for skip in range(0, len(data), SECTOR)
        ]
        size = self.file.size
        self._sequence += 1
        entry = pack_entry(
            changes,
            sequence=self._sequence,
            tail=0,
            guid=self._guid,
            flushed_size=round_down(size, MIB),
            last_size=round_up(size, MIB),
        )
        self.file.write(headers.current.log_offset, entry)
