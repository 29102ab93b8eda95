"""Checking an image, and putting it right: in the order of ``qemu-img check``, with its words.

What is repaired is durable before the next step begins. Two entries that share a cluster are told
apart by giving the later one a copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Fix
from lamina.formats.parallels.layout import IN_USE
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.formats.parallels.mapping import ParallelsMapping
    from lamina.formats.parallels.survey import Survey

_STEP = 4 << 20
"""Bytes that are copied at a time."""


def check(mapping: ParallelsMapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """Nobody else may use the disk meanwhile. Raises StorageError."""
    return _Check(mapping, fix, report).run()


class _Check:
    def __init__(
        self, mapping: ParallelsMapping, fix: Fix, report: Callable[[str], None]
    ) -> None:
        self.mapping = mapping
        self.fix = fix
        self.report = report
        self.result = CheckResult(total_clusters=mapping.header.entries)

    def run(self) -> CheckResult:
        mapping = self.mapping
        if not mapping.disk.read_only:
            mapping.metadata.commit()
            mapping.metadata.barrier()
        self.check_unclean()
        self.check_extension()
        found = mapping.survey()
        self.check_data_start(found)
        found = self.check_outside(found)
        self.check_leaks(found)
        self.check_duplicates(found)
        return self.result

    def say(self, wrong: str, *, repairing: bool) -> None:
        """A corruption; counted with what is there, or with what is repaired."""
        self.report(f"{'Repairing' if repairing else 'ERROR'} {wrong}")
        if repairing:
            self.result.corruptions_fixed += 1
        else:
            self.result.corruptions += 1

    def check_unclean(self) -> None:
        if self.mapping.header.in_use != IN_USE:
            return
        self.say("image was not closed correctly", repairing=self.fix.errors)
        if self.fix.errors:
            self.mapping.write_state(replace(self.mapping.header, in_use=0))

    def check_extension(self) -> None:
        error = self.mapping.extension_error
        if error is None:
            return
        self.say(str(error), repairing=self.fix.errors)
        if self.fix.errors:
            self.mapping.write_state(replace(self.mapping.header, extension_sector=0))
            self.mapping.extension_error = None

    def check_data_start(self, found: Survey) -> None:
        mapping = self.mapping
        if not mapping.has_bad_data_start(found):
            return
        self.say("data_off field has incorrect value", repairing=self.fix.errors)
        if self.fix.errors:
            start = mapping.data_offset(found) // SECTOR
            mapping.write_state(replace(mapping.header, data_start=start))

    def check_outside(self, found: Survey) -> Survey:
        mapping = self.mapping
        for block in found.outside:
            self.say(f"cluster {block} is outside image", repairing=self.fix.errors)
            if self.fix.errors:
                mapping.table[block] = 0
        if found.outside and self.fix.errors:
            self.store()
        return found

    def check_leaks(self, found: Survey) -> None:
        mapping, file = self.mapping, self.mapping.file
        used = mapping.space_in_use(found)
        end = used[-1][1] if used else mapping.data_offset(found)
        self.result.image_end_offset = end
        self.result.allocated_clusters = found.allocated
        self.result.fragmented_clusters = found.fragmented
        leaked = file.size - end
        if leaked <= 0 or (found.outside and not self.fix.errors):
            # What lies behind may be a part of a cluster that is not wholly there.
            return
        repairing = self.fix.leaks
        count = -(-leaked // mapping.unit)
        self.report(
            f"{'Repairing' if repairing else 'ERROR'} space leaked at the end of the image {leaked}"
        )
        if repairing:
            if mapping.header.extension_sector * SECTOR >= end:
                # It is out of date, and goes with the space that it is in.
                mapping.write_state(replace(mapping.header, extension_sector=0))
            file.truncate(end, exact=False)
            mapping.growth.length = file.size
            self.result.leaks_fixed += count
        else:
            self.result.leaks += count

    def check_duplicates(self, found: Survey) -> None:
        mapping = self.mapping
        if found.duplicate and self.fix.errors:
            mapping.set_free_space(found)
        for block in found.duplicate:
            self.say(f"duplicate offset in BAT entry {block}", repairing=self.fix.errors)
            if self.fix.errors:
                place = mapping.clusters.take()
                self.copy(mapping.table[block] * mapping.scale, place)
                mapping.table[block] = place // mapping.scale
        if found.duplicate and self.fix.errors:
            self.store()
            mapping.growth.length = mapping.file.size
            self.result.image_end_offset = mapping.clusters.end

    def copy(self, source: int, target: int) -> None:
        file = self.mapping.file
        for at in range(0, self.mapping.unit, _STEP):
            length = min(_STEP, self.mapping.unit - at)
            file.write(target + at, file.read(source + at, length))
        self.mapping.metadata.data_written(file)

    def store(self) -> None:
        """Entries of the BAT, behind what they name."""
        self.mapping.metadata.commit()
        self.mapping.metadata.barrier()
