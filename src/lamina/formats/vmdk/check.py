"""Checking a VMDK: entries that name nothing, places named twice, copies that differ, lost space.

Tables are looked at as arrays. What is found is reported in QEMU's words where it has some.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np

from lamina.block.driver import CheckResult, Fix
from lamina.block.extents import Kind
from lamina.errors import ImageCorrupt
from lamina.formats.vmdk.extents import GrainExtent
from lamina.formats.vmdk.layout import ENTRY_SIZE, GRAIN_MARKER_SIZE, UNCLEAN_FIELD, parse_marker
from lamina.formats.vmdk.repair import copy_grain, renew_copy, replace_table
from lamina.formats.vmdk.sparse import SparseExtent
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

    from lamina.formats.vmdk.mapping import VmdkMapping

    Sectors = npt.NDArray[np.int64]

Report = Callable[[str], None]
_STEP = 1 << 20
"""Grains looked at at a time."""
_TABLES = 512
"""Tables that are held against their copies at a time."""
_MARKERS = 4096
"""Markers of compressed grains that are read with one call."""


def check(mapping: VmdkMapping, fix: Fix, report: Report) -> CheckResult:
    """Raises what reading the image raises; damage is counted."""
    result = CheckResult()
    if not mapping.disk.read_only:
        # Tables are looked at where they are stored.
        mapping.flush()
    for extent in mapping.extents:
        if isinstance(extent, SparseExtent):
            SparseCheck(mapping, extent, fix, report, result).run()
        elif isinstance(extent, GrainExtent):
            GrainCheck(extent, report, result).run()
    if fix != Fix():
        mapping.metadata.commit()
        mapping.metadata.barrier()
    return result


class GrainCheck:
    """What every kind of table can get wrong."""

    def __init__(self, extent: GrainExtent, report: Report, result: CheckResult) -> None:
        self.extent = extent
        self.report = report
        self.result = result
        self.grains = -(-extent.length // extent.grain)

    def run(self) -> None:
        for first, sectors in self.pieces():
            self.look_at(first, sectors)

    def pieces(self) -> Iterator[tuple[int, Sectors]]:
        """(first grain, entries) of the whole extent."""
        for first in range(0, self.grains, _STEP):
            found = self.extent.entries_array(first, min(_STEP, self.grains - first))
            assert isinstance(found, np.ndarray)
            yield first, found

    def look_at(self, first: int, sectors: Sectors) -> None:
        for number in self.lost(first, sectors):
            self.report(f"ERROR: cluster offset for sector {number} points after EOF")
            self.result.corruptions += 1

    def lost(self, first: int, sectors: Sectors) -> list[int]:
        """Guest sectors of grains that lie behind the end of the file."""
        end = self.extent.node.size
        wrong = np.flatnonzero((sectors > 1) & (sectors * SECTOR >= end))
        return [self.guest_sector(first + int(index)) for index in wrong]

    def guest_sector(self, grain: int) -> int:
        return (self.extent.start + grain * self.extent.grain) // SECTOR


class SparseCheck(GrainCheck):
    extent: SparseExtent

    def __init__(
        self,
        mapping: VmdkMapping,
        extent: SparseExtent,
        fix: Fix,
        report: Report,
        result: CheckResult,
    ) -> None:
        super().__init__(extent, report, result)
        self.extent = extent
        self.mapping = mapping
        self.fix = fix if extent.writable else Fix()
        self.taken: list[npt.NDArray[np.uint32]] = []
        """Sectors at which grains begin."""
        self.unreadable = False
        """Some table cannot be read: nothing can be said of its grains, or of what is lost."""
        self.changed = False
        """A repair changes what the disk reads as."""

    def run(self) -> None:
        header = self.extent.header
        self._look_at_tables()
        if self.unreadable:
            return
        super().run()
        if not header.compressed:
            # What repairs have added is a part of the file from now on.
            self.mapping.metadata.commit()
            self._look_for_overlaps_and_leaks()
        if header.unclean:
            self.report("The image was not closed by its last user")
            if self.fix.errors and not self.result.corruptions:
                self.extent.node.write(UNCLEAN_FIELD, b"\0")
                self.extent.header = replace(header, unclean=False)
                self.result.corruptions_fixed += 1

    # -- tables ----------------------------------------------------------------------------------

    def _look_at_tables(self) -> None:
        """Those that are named, and their copies, many at a time."""
        extent, header = self.extent, self.extent.header
        places = self._directory(header.directory_offset)
        wrong = places + header.table_bytes > extent.table_limit
        for number in np.flatnonzero(wrong).tolist():
            self._wrong_table(number)
        if not header.has_redundant:
            return
        if not extent.has_redundant_directory:
            self.report("ERROR: the redundant grain directory lies outside of the image")
            self.result.corruptions += 1
            return
        copies = self._directory(header.redundant_offset)
        copies[copies + header.table_bytes > extent.table_limit] = 0
        places[wrong] = 0
        numbers = np.flatnonzero(places)
        for first in range(0, len(numbers), _TABLES):
            some = numbers[first : first + _TABLES]
            different = (self._tables(places[some]) != self._tables(copies[some])).any(axis=1)
            for number in some[different | (copies[some] == 0)].tolist():
                self._different_copy(number)

    def _directory(self, offset: int) -> Sectors:
        """Host offsets of all tables that this directory names."""
        words = np.zeros(self.extent.header.directory_entries, "<u4")
        if len(words):
            self.extent.node.readv([(offset, words.data.cast("B"))])
        return words.astype(np.int64) * SECTOR

    def _tables(self, places: Sectors) -> npt.NDArray[np.uint32]:
        """A row for each; of zeroes for one that there is not."""
        tables = np.zeros((len(places), self.extent.header.table_entries), "<u4")
        self.extent.node.readv(
            [
                (place, row.data.cast("B"))
                for place, row in zip(places.tolist(), tables, strict=True)
                if place
            ]
        )
        return tables

    def _wrong_table(self, number: int) -> None:
        try:
            self.extent.table_offset(number)
        except ImageCorrupt as error:
            self.report(f"ERROR: {error}")
        # A stream has no room for another table.
        if not self.fix.errors or self.extent.compressed:
            self.result.corruptions += 1
            self.unreadable = True
            return
        self._change_content()
        replace_table(self.extent, number)
        self.result.corruptions_fixed += 1

    def _different_copy(self, number: int) -> None:
        extent = self.extent
        self.report(f"ERROR: the redundant copy of grain table {number} is different")
        if not self.fix.errors:
            self.result.corruptions += 1
            return
        if copy := extent.copy_offset(number):
            table = extent.tables.get(extent.table_offset(number))
            self._take_from_copy(number, table, extent.copies.get(copy))
        renew_copy(extent, number)
        self.result.corruptions_fixed += 1

    def _take_from_copy(self, number: int, table: bytearray, copy: bytearray) -> None:
        """Entries that cannot be, where the copy knows better."""
        ours, theirs = np.frombuffer(table, "<u4"), np.frombuffer(copy, "<u4")
        end = self.extent.node.size // SECTOR
        first = self._first_place() // SECTOR
        better = (ours >= end) & (theirs >= first) & (theirs < end)
        for index in np.flatnonzero(better).tolist():
            grain = number * self.extent.header.table_entries + index
            sector = int(theirs[index])
            where = self.guest_sector(grain)
            self.report(f"ERROR: cluster offset for sector {where} points after EOF")
            self._change_content()
            self.extent.set_entries(grain, [sector])
            self.result.corruptions_fixed += 1

    # -- entries ---------------------------------------------------------------------------------

    def look_at(self, first: int, sectors: Sectors) -> None:
        for number in self.lost(first, sectors):
            self._wrong(number, f"cluster offset for sector {number} points after EOF")
        low = np.flatnonzero((sectors > 1) & (sectors * SECTOR < self._first_place()))
        for index in low.tolist():
            number = self.guest_sector(first + index)
            self._wrong(number, f"cluster offset for sector {number} points into metadata")
        if self.extent.compressed:
            self._look_at_markers(first, sectors)
            return
        places = sectors * SECTOR
        good = (places >= self._first_place()) & (places < self.extent.node.size)
        self.taken.append(sectors[good].astype(np.uint32))

    def _first_place(self) -> int:
        return max(self.extent.header.overhead, 2 * SECTOR)

    def _wrong(self, guest_sector: int, what: str) -> None:
        self.report(f"ERROR: {what}")
        if not self.fix.errors:
            self.result.corruptions += 1
            return
        self._change_content()
        grain = (guest_sector * SECTOR - self.extent.start) // self.extent.grain
        self.extent.set_entries(grain, [0])
        self.result.corruptions_fixed += 1

    def _change_content(self) -> None:
        """Children of the disk are to notice; repairs that change nothing for the guest are none of
        their business."""
        if not self.changed:
            self.mapping.renew_cid()
            self.changed = True

    def _look_at_markers(self, first: int, sectors: Sectors) -> None:
        """Every compressed grain says which one it is."""
        extent = self.extent
        end = extent.node.size
        valid = (sectors * SECTOR >= self._first_place()) & (sectors * SECTOR < end)
        numbers = np.flatnonzero(valid)
        for start in range(0, len(numbers), _MARKERS):
            some = numbers[start : start + _MARKERS].tolist()
            heads = [memoryview(bytearray(16)) for _ in some]
            places = [int(sectors[index]) * SECTOR for index in some]
            extent.node.readv(list(zip(places, heads, strict=True)))
            for index, place, head in zip(some, places, heads, strict=True):
                value, size, _ = parse_marker(head)
                number = (first + index) * extent.grain // SECTOR
                if value != number or place + GRAIN_MARKER_SIZE + size > end or not size:
                    where = self.guest_sector(first + index)
                    self._wrong(where, f"the grain of sector {where} is another one")

    # -- space -----------------------------------------------------------------------------------

    def _look_for_overlaps_and_leaks(self) -> None:
        extent = self.extent
        grain = extent.grain // SECTOR
        taken = np.concatenate([*self.taken, np.zeros(0, np.uint32)])
        taken.sort()
        shared = int(np.count_nonzero(np.diff(taken.astype(np.int64)) < grain))
        if shared:
            self.report(f"ERROR: {shared} grains lie where others do")
            if self.fix.errors:
                taken = np.append(taken, self._part(taken))
                taken.sort()
            else:
                self.result.corruptions += shared
        leaked = 0
        end = extent.header.overhead
        starts = np.sort(np.concatenate((taken.astype(np.int64) * SECTOR, self._other_places())))
        # Where something begins later than everything before it has ended.
        reached = np.maximum.accumulate(np.append(end, starts + extent.grain))
        starts = np.append(starts, extent.node.size)
        for index in np.flatnonzero(starts - reached >= extent.grain).tolist():
            leaked += self._give_back(round_up(int(reached[index]), SECTOR), int(starts[index]))
        self._count_leaks(leaked)

    def _part(self, taken: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Grains that share a place get, but for the first one, places of their own: sectors.

        Nobody knows whose the shared bytes are: each gets what is there.
        """
        extent, grain = self.extent, self.extent.grain // SECTOR
        close = np.flatnonzero(np.diff(taken.astype(np.int64)) < grain)
        crowded = np.unique(np.concatenate((taken[close], taken[close + 1])))
        kept: list[int] = []
        """Places that their first grain keeps, in order."""
        new: list[int] = []
        for first, sectors in self.pieces():
            for index in np.flatnonzero(np.isin(sectors, crowded)).tolist():
                sector = int(sectors[index])
                after = bisect_left(kept, sector)
                near = kept[max(after - 1, 0) : after + 1]
                if all(abs(sector - other) >= grain for other in near):
                    kept.insert(after, sector)
                    continue
                new.append(copy_grain(extent, first + index, sector * SECTOR) // SECTOR)
                self.result.corruptions_fixed += 1
                self.mapping.metadata.relieve()
        self.mapping.metadata.commit()
        return np.array(new, np.uint32)

    def _other_places(self) -> Sectors:
        """Places behind that of the first grain which hold no grains, in steps of one."""
        extent = self.extent
        header = extent.header
        named = [self._directory(header.directory_offset)]
        if extent.has_redundant_directory:
            named.append(self._directory(header.redundant_offset))
        places = np.concatenate(named)
        others = places[places >= header.overhead].tolist()
        length = header.directory_entries * ENTRY_SIZE
        for directory in (header.directory_offset, header.redundant_offset):
            if directory >= header.overhead:
                others += range(directory, directory + length, extent.grain)
        return np.array(others, np.int64)

    def _give_back(self, start: int, end: int) -> int:
        """How many grains of this space, which nobody names, take room; they are freed if that is
        wanted."""
        extent = self.extent
        grain = extent.grain
        found = 0
        for piece in extent.node.extents(start, end - start) if end > start else ():
            if piece.kind == Kind.ZERO:
                continue
            first = max(piece.guest_offset // grain * grain, start)
            found += -(-(piece.end - first) // grain)
        if found and self.fix.leaks:
            extent.node.discard(start, end - start)
            if end == extent.node.size:
                extent.node.truncate(start)
                extent.space.cut(start)
        return found

    def _count_leaks(self, leaked: int) -> None:
        if not leaked:
            return
        self.report(f"Leaked {leaked} grains of {self.extent.node.filename}")
        if self.fix.leaks:
            self.result.leaks_fixed += leaked
        else:
            self.result.leaks += leaked
