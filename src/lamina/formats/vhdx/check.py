"""``check``: are the structures valid, and does every block have a place of its own?

Space that nothing names is not counted as leaked: images of every maker have gaps, and writing to
an image fills them.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Fix
from lamina.errors import ImageCorrupt
from lamina.formats.vhdx.layout import (
    BITMAP_PRESENT,
    FULLY_PRESENT,
    HEADER_SECTION,
    OFFSET,
    PARTIALLY_PRESENT,
    REGION_TABLE_OFFSETS,
    RESERVED,
    STATE,
    ZERO,
    pack_regions,
)
from lamina.formats.vhdx.metadata import MAX_SIZE
from lamina.formats.vhdx.parent import check_linkage
from lamina.hints import TYPE_CHECKING
from lamina.units import MIB, round_up

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping


def check(mapping: VhdxMapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """Raises what reading and writing raise."""
    return _Check(mapping, fix, report).run()


class _Check:
    def __init__(self, mapping: VhdxMapping, fix: Fix, report: Callable[[str], None]) -> None:
        self.mapping = mapping
        self.repair = fix.errors and not mapping.disk.read_only
        self.report = report
        self.result = CheckResult()

    def run(self) -> CheckResult:
        if self.mapping.end > 2 * MAX_SIZE:
            raise ImageCorrupt(f"The file is {self.mapping.end} bytes long", format="vhdx")
        self._log()
        self._headers()
        self._region_tables()
        self._parent()
        self._blocks()
        if self.result.corruptions_fixed:
            self.mapping.metadata.commit()
            self.mapping.metadata.barrier()
        return self.result

    def _found(self, what: str, *, repaired: bool = False) -> None:
        if repaired:
            self.result.corruptions_fixed += 1
            self.report(f"Repairing: {what}")
        else:
            self.result.corruptions += 1
            self.report(f"ERROR {what}")

    def _log(self) -> None:
        """It was carried out when the image was opened: in the file, if that is writable."""
        image = self.mapping.image
        if not image.replayed:
            return
        if self.mapping.disk.read_only:
            self._found("the log holds changes that have not been carried out")
        else:
            self.result.corruptions_fixed += 1
            image.replayed = False

    def _headers(self) -> None:
        headers = self.mapping.headers
        for number, valid in enumerate(headers.valid, 1):
            if not valid:
                self._found(f"header {number} is not valid", repaired=self.repair)
        if self.repair and not all(headers.valid):
            headers.update()

    def _region_tables(self) -> None:
        image = self.mapping.image
        for number, good in enumerate(image.good_tables, 1):
            if not good:
                what = f"region table {number} is not valid or differs from the other one"
                self._found(what, repaired=self.repair)
        if self.repair and not all(image.good_tables):
            self.mapping.begin(data=False)
            table = pack_regions(image.regions)
            for offset in REGION_TABLE_OFFSETS:
                self.mapping.patch(offset, table)
            image.good_tables = (True, True)

    def _parent(self) -> None:
        parent = self.mapping.disk.backing
        if self.mapping.differencing and parent is not None:
            try:
                check_linkage(self.mapping.image, parent)
            except ImageCorrupt as error:
                self._found(str(error))

    # -- blocks ----------------------------------------------------------------------------------

    def _blocks(self) -> None:
        mapping = self.mapping
        bat = mapping.bat
        used = bytearray(round_up(mapping.end, MIB) // MIB)
        for start, end in [(0, HEADER_SECTION), *mapping.regions_and_log]:
            if end <= mapping.end:
                used[start // MIB : end // MIB] = b"\1" * ((end - start) // MIB)
        needed = mapping.end
        for first, entries in bat.everything():
            for index, entry in enumerate(entries, first):
                if entry & ~STATE or entry & STATE not in (0, ZERO):
                    needed = max(needed, self._entry(index, entry, used))
        if needed > mapping.end:
            self._found("the last block is not in the file as a whole", repaired=self.repair)
            if self.repair:
                mapping.file.truncate(needed)
                mapping.metadata.data_written(mapping.file)
                mapping.grown()

    def _entry(self, index: int, entry: int, used: bytearray) -> int:
        """Look at one entry; returns where the file has to end for its sake."""
        mapping = self.mapping
        bat = mapping.bat
        state, start = entry & STATE, entry & OFFSET
        if bat.is_bitmap(index):
            # Only differencing images have bitmaps; of others QEMU fills these entries too.
            if mapping.differencing and state == BITMAP_PRESENT:
                self._claim(index, start, start + MIB, used)
            elif mapping.differencing and state:
                self._bad(index, f"has the state {state}")
            return 0
        block = bat.block_of(index)
        if state == RESERVED or (state == PARTIALLY_PRESENT and not mapping.differencing):
            self._bad(index, f"has the state {state}")
            return 0
        if state not in (FULLY_PRESENT, PARTIALLY_PRESENT):
            return 0
        if state == PARTIALLY_PRESENT and not mapping.bitmaps.host_offset(block // bat.ratio):
            self._bad(index, "is partially present without a bitmap")
            return 0
        if start >= mapping.end:
            self._bad(index, f"points to {start}, behind the end of the file")
            return 0
        if not self._claim(index, start, start + mapping.unit, used):
            return 0
        return start + min(mapping.unit, mapping.size - block * mapping.unit)

    def _claim(self, index: int, start: int, end: int, used: bytearray) -> bool:
        """Nobody else may be there."""
        span = slice(start // MIB, min(end // MIB, len(used)))
        if b"\1" in used[span]:
            self._found(f"VHDX BAT entry {index}: {start}-{end} is used twice")
            return False
        used[span] = b"\1" * (span.stop - span.start)
        return True

    def _bad(self, index: int, what: str) -> None:
        """An entry whose data are lost, if there ever were any."""
        self._found(f"VHDX BAT entry {index} {what}", repaired=self.repair)
        if self.repair:
            self.mapping.disk.writer.open_gate()
            bat = self.mapping.bat
            if bat.is_bitmap(index):
                bat.set_bitmap(index // (bat.ratio + 1), 0)
            else:
                bat.set(bat.block_of(index), ZERO)
            self.mapping.metadata.relieve()
