"""Space in the file: megabytes that nothing uses, or more of them at its end.

The format keeps no record of free space. Before the first allocation the table of blocks is read
once and what it names is marked, a byte for each megabyte; what is left are gaps: blocks given back
by earlier users, space leaked in a crash, or what a fixed image of QEMU keeps for its blocks.
"""

from __future__ import annotations

from contextlib import suppress

from lamina.block.limits import Preallocation, WriteFlags
from lamina.errors import ImageUnsupported, LaminaError
from lamina.formats.vhdx.layout import BITMAP_PRESENT, HEADER_SECTION, NOT_PRESENT, STATE, ZERO
from lamina.formats.vhdx.metadata import MAX_SIZE
from lamina.hints import TYPE_CHECKING
from lamina.units import MIB, round_up

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping

_LARGEST = 2 * MAX_SIZE
"""Bytes of a file whose gaps are looked for."""


class Space:
    def __init__(self, mapping: VhdxMapping) -> None:
        self._mapping = mapping
        self._used = bytearray()
        """For each megabyte of the file: 1 if something is there."""
        self._known = False
        self._first = 0
        """No gap begins before this megabyte."""

    def allocate(self, length: int) -> int:
        """Host offset of ``length`` bytes (megabytes) that read as zeroes.

        The file is as long as needed. Raises what the file raises.
        """
        self._look()
        count = length // MIB
        used = self._used
        at = used.find(bytes(count), self._first)
        if at < 0:
            at = len(used.rstrip(b"\0"))
        self._clear(at * MIB, length)
        # Before anything names it, that it reads as zeroes is durable.
        self._mapping.metadata.data_written(self._mapping.file)
        if at * MIB + length > self._mapping.file.size:
            self._extend(at * MIB + length)
        if len(used) < at + count:
            used.extend(bytes(at + count - len(used)))
        used[at : at + count] = b"\1" * count
        if used.find(b"\0", self._first, at) < 0:
            self._first = at + count
        return at * MIB

    def append(self, length: int, preallocation: Preallocation) -> int:
        """Host offset of ``length`` bytes (megabytes), zeroes, behind everything else."""
        self._look()
        start = len(self._used) * MIB
        self._extend(start + length, preallocation)
        self._used.extend(b"\1" * (length // MIB))
        return start

    @property
    def end(self) -> int:
        """Where the last megabyte in use ends."""
        self._look()
        return len(self._used.rstrip(b"\0")) * MIB

    def cut(self, end: int) -> None:
        """The file ends here now."""
        del self._used[end // MIB :]
        self._first = min(self._first, end // MIB)

    def _extend(self, end: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        mapping = self._mapping
        mapping.file.truncate(end, preallocation)
        # What the log says about the length of the file must be true when it says it.
        mapping.metadata.data_written(mapping.file)
        mapping.grown()

    def _clear(self, start: int, length: int) -> None:
        """Make a gap read as zeroes, where it lies within the file."""
        inside = min(start + length, self._mapping.file.size) - start
        if inside <= 0:
            return
        try:
            self._mapping.file.write_zeroes(
                start, inside, WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK
            )
        except ImageUnsupported:
            self._mapping.file.write_zeroes(start, inside, WriteFlags.MAY_UNMAP)

    def give_back(self, host_offset: int, length: int) -> None:
        """At once: space that no table on storage or in flight knows of."""
        if self._known:
            first, count = host_offset // MIB, length // MIB
            self._used[first : first + count] = bytes(count)
            self._first = min(self._first, first)

    def free_later(self, spans: list[tuple[int, int]]) -> None:
        """(host offset, length) that no table names any more, once that is durable."""
        if not spans:
            return
        self._look()
        for span in spans:
            # The tables do not say so any more.
            self._mark(*span)
        self._mapping.metadata.when_durable(lambda: self._free(spans))

    def _free(self, spans: list[tuple[int, int]]) -> None:
        for host_offset, length in spans:
            self.give_back(host_offset, length)
            with suppress(LaminaError):
                self._mapping.file.discard(host_offset, length)

    # -- what is in use --------------------------------------------------------------------------

    def _look(self) -> None:
        if self._known:
            return
        mapping = self._mapping
        size = mapping.file.size
        if size > _LARGEST:
            raise ImageUnsupported(
                f"Files of {size} bytes are not written to", path=mapping.file.filename
            )
        self._used = bytearray(round_up(size, MIB) // MIB)
        self._mark(0, HEADER_SECTION)
        for start, end in mapping.regions_and_log:
            self._mark(start, end - start)
        bat, unit = mapping.bat, mapping.unit
        for first, entries in bat.everything():
            for number, entry in enumerate(entries):
                state, host = entry & STATE, entry >> 20
                if not host or state in (NOT_PRESENT, ZERO):
                    continue
                if not bat.is_bitmap(first + number):
                    self._mark(host * MIB, unit)
                elif state == BITMAP_PRESENT:
                    self._mark(host * MIB, MIB)
        self._known = True

    def _mark(self, host_offset: int, length: int) -> None:
        """The last block may reach over the end of the file."""
        used = self._used
        first, last = host_offset // MIB, (host_offset + length) // MIB
        if host_offset < self._mapping.file.size:
            used.extend(bytes(max(last - len(used), 0)))
            used[first:last] = b"\1" * (last - first)
