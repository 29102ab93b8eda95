"""Finding what a log holds [2.3.2] and carrying it out [2.3.3], in the file or in memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.limits import WriteFlags
from lamina.block.node import Node, ReadRequest, WriteRequest
from lamina.engine.reader import fill_zeroes
from lamina.errors import ImageCorrupt, ImageUnsupported, Refused
from lamina.formats.vhdx.layout import NO_GUID, Header
from lamina.formats.vhdx.log import (
    SECTOR,
    Change,
    EntryHeader,
    check_targets,
    parse_entry,
    parse_entry_header,
)
from lamina.formats.vhdx.metadata import MAX_SIZE
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.records import replace
from lamina.units import MIB, round_up

if TYPE_CHECKING:
    from lamina.block.info import NodeInfo

_CHUNK = MIB
"""Bytes of a log that are looked at together."""
_MAX_ENTRY = 64 * MIB
"""Bytes, and …"""
_MAX_DESCRIPTORS = 1 << 14
"""… descriptors that a log may make us hold. Logs in use are a megabyte long."""


class Entry(NamedTuple):
    """A valid entry, found at ``at`` of the log."""

    at: int
    header: EntryHeader


class Pending:
    """The active sequence of a log: entries that have to be carried out."""

    def __init__(self, file: Node, header: Header) -> None:
        """``header``'s log lies within the file. Raises ImageCorrupt if the file was cut."""
        self.file = file
        self.log = (header.log_offset, header.log_offset + header.log_length)
        self._length = header.log_length
        self.entries: list[Entry] = []
        if header.log_guid != NO_GUID:
            self.entries = _active_sequence(self._find(header.log_guid), self._length)
        size = file.size
        for _, entry in self.entries:
            if entry.flushed_size > size:
                raise ImageCorrupt(
                    f"The file is {size} bytes long, but was {entry.flushed_size} when its log was "
                    "written: it has been truncated",
                    path=file.filename,
                    format="vhdx",
                    structure="log entry",
                    field="FlushedFileOffset",
                )
        last = max((entry.last_size for _, entry in self.entries), default=0)
        if last > 2 * MAX_SIZE:
            raise ImageCorrupt(
                f"The log says that the file is {last} bytes long",
                path=file.filename,
                format="vhdx",
                structure="log entry",
                field="LastFileOffset",
            )
        self.size = max(size, round_up(last, MIB)) if self.entries else size
        """Of the file afterwards."""
        if sum(entry.descriptors for _, entry in self.entries) > _MAX_DESCRIPTORS:
            raise _too_large(file)

    def changes(self) -> Iterator[list[Change]]:
        """What the entries ask for, an entry at a time. Raises ImageCorrupt."""
        for at, header in self.entries:
            changes = parse_entry(self._read(at, header.length))
            if changes is None:
                raise ImageCorrupt("The log changes while it is read", path=self.file.filename)
            check_targets(changes, log=self.log, end=self.size)
            yield changes

    def carry_out(self) -> None:
        """In the file, durably. Doing it twice does no harm."""
        for changes in self.changes():
            if self.file.size < self.size:
                self.file.truncate(self.size)
            for offset, length, data in changes:
                if data is None:
                    self.file.write_zeroes(offset, length, WriteFlags.MAY_UNMAP)
                else:
                    self.file.write(offset, data)
        self.file.flush()

    # -- finding ---------------------------------------------------------------------------------

    def _read(self, at: int, length: int) -> bytes:
        """Of the ring."""
        inside = min(length, self._length - at)
        found = self.file.read(self.log[0] + at, inside)
        return found + self.file.read(self.log[0], length - inside) if inside < length else found

    def _find(self, guid: bytes) -> dict[int, Entry]:
        """The valid entries of this log by their place in it.

        No sector of an entry but its first begins with the signature of one, so valid entries never
        overlap, and what an invalid one costs ends where the next begins.
        """
        found: dict[int, Entry] = {}
        for start in range(0, self._length, _CHUNK):
            chunk = self._read(start, min(_CHUNK, self._length - start))
            at = chunk.find(b"loge")
            while at >= 0:
                if at % SECTOR == 0:
                    header = parse_entry_header(memoryview(chunk)[at : at + SECTOR])
                    if header and header.guid == guid and self._is_valid(start + at, header):
                        found[start + at] = Entry(start + at, header)
                at = chunk.find(b"loge", at + 1)
        return found

    def _is_valid(self, at: int, header: EntryHeader) -> bool:
        if header.length > self._length or header.tail >= self._length:
            return False
        if header.length > _MAX_ENTRY or header.descriptors > _MAX_DESCRIPTORS:
            raise _too_large(self.file)
        # Cheap tests first: the sectors behind the first must not begin an entry.
        for skip in range(SECTOR, header.length, _CHUNK):
            part = self._read((at + skip) % self._length, min(_CHUNK, header.length - skip))
            if any(part.startswith(b"loge", place) for place in range(0, len(part), SECTOR)):
                return False
        return parse_entry(self._read(at, header.length)) is not None


def _active_sequence(entries: dict[int, Entry], length: int) -> list[Entry]:
    """The valid sequence with the highest sequence number, from its tail on; [] if there is none.

    A sequence is a run of entries, one right behind the other, with ascending numbers; it is valid
    if the tail of its last entry is one of them.
    """

    def behind(entry: Entry) -> Entry | None:
        following = entries.get((entry.at + entry.header.length) % length)
        if following and following.header.sequence == entry.header.sequence + 1:
            return following
        return None

    successors = {found.at for entry in entries.values() if (found := behind(entry))}
    best: list[Entry] = []
    for start in entries.values():
        if start.at in successors:
            continue
        run = [start]
        while following := behind(run[-1]):
            run.append(following)
        tails = [place for place, entry in enumerate(run) if entry.at == run[-1].header.tail]
        newest = best[-1].header.sequence if best else 0
        if tails and run[-1].header.sequence > newest:
            best = run[tails[0] :]
    return best


def _too_large(file: Node) -> ImageUnsupported:
    return ImageUnsupported(
        "The VHDX log has more descriptors or larger entries than are supported",
        path=file.filename,
        format="vhdx",
        structure="log entry",
    )


# -- in memory -------------------------------------------------------------------------------------


class ReplayedFile(Node):
    """A file as it will be once its log has been carried out: for images opened read-only."""

    driver = "vhdx-log"

    def __init__(self, file: Node, pending: Pending) -> None:
        super().__init__(replace(file.options, node_name="", read_only=True))
        self._file = file
        self._size = pending.size
        self._sectors: dict[int, bytes] = {}
        """File offset -> content."""
        self._offsets: list[int] = []
        """Of the sectors, sorted."""
        self._zeroes: list[tuple[int, int]] = []
        """(start, end), sorted, without overlaps; what ``_sectors`` holds is newer."""
        for changes in pending.changes():
            for offset, length, data in changes:
                if data is None:
                    self._zero(offset, offset + length)
                else:
                    if offset not in self._sectors:
                        insort(self._offsets, offset)
                    self._sectors[offset] = data

    def _zero(self, start: int, end: int) -> None:
        first, last = bisect_left(self._offsets, start), bisect_left(self._offsets, end)
        for offset in self._offsets[first:last]:
            del self._sectors[offset]
        del self._offsets[first:last]
        spans = self._zeroes
        first = bisect_left(spans, (start, start))
        if first and spans[first - 1][1] >= start:
            first -= 1
        last = bisect_right(spans, (end, 2 * MAX_SIZE + MIB))
        if first < last:
            start, end = min(start, spans[first][0]), max(end, spans[last - 1][1])
        spans[first:last] = [(start, end)]

    @property
    def size(self) -> int:
        return self._size

    def info(self) -> NodeInfo:
        return self._file.info()

    def event(self, name: str) -> None:
        self._file.event(name)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        there = self._file.size
        reads: list[ReadRequest] = []
        for offset, buffer in requests:
            inside = max(min(there - offset, len(buffer)), 0)
            if inside:
                reads.append((offset, buffer[:inside]))
            fill_zeroes(buffer[inside:])
        if reads:
            self._file.readv(reads)
        for offset, buffer in requests:
            self._patch(offset, buffer)

    def _patch(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        first = max(bisect_left(self._zeroes, (offset, 0)) - 1, 0)
        for start, stop in self._zeroes[first : bisect_left(self._zeroes, (end, 0))]:
            if stop > offset:
                fill_zeroes(buffer[max(start - offset, 0) : stop - offset])
        first = bisect_right(self._offsets, offset - SECTOR)
        for place in self._offsets[first : bisect_left(self._offsets, end)]:
            skip = max(offset - place, 0)
            part = self._sectors[place][skip : end - place]
            at = place + skip - offset
            buffer[at : at + len(part)] = part

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        raise Refused("Block node is read-only")

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA, self, offset)]
