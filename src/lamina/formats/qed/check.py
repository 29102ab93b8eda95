"""Check and repair: every table and cluster is named once, and lies in the file.

What nobody names is a leak. QED cannot use such space again; where it ends the file, it is cut off.
"""

from __future__ import annotations

import errno

import numpy as np

from lamina.block.driver import CheckResult, Fix
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.qed.layout import ZERO_CLUSTER
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from lamina.formats.qed.mapping import QedMapping

MAX_CLUSTERS = 1 << 32
"""Of a file that can be checked: memory takes a byte for each that is in use."""


def check(mapping: QedMapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """Raises ImageUnsupported for a file that is too large, StorageError.

    A check that repairs and leaves no corruption behind clears the mark NEED_CHECK.
    """
    work = _Check(mapping, fix, report)
    work.run()
    result = work.result
    if (fix.leaks or fix.errors) and not result.corruptions:
        mapping.metadata.commit()
        mapping.metadata.barrier()
        mapping.mark_clean()
        mapping.metadata.commit()
    return result


def repair(mapping: QedMapping) -> None:
    """Before an image that is marked is written to. Raises ImageCorrupt if damage stays."""
    result = check(mapping, Fix(leaks=True, errors=True), lambda line: None)
    if result.corruptions or result.check_errors:
        raise ImageCorrupt(
            "Image corrupted", path=mapping.file.filename, format="qed", structure="tables"
        )
    mapping.file.flush()


class _Check:
    def __init__(self, mapping: QedMapping, fix: Fix, report: Callable[[str], None]) -> None:
        self.mapping = mapping
        self.fix = fix
        self.report = report
        self.result = CheckResult()
        self.unit = mapping.unit
        self.clusters = mapping.appender.end // self.unit
        if self.clusters > MAX_CLUSTERS:
            raise ImageUnsupported("The file is too large to be checked", errno=errno.EFBIG)
        self.named = np.zeros(self.clusters, dtype=bool)
        """Clusters of the file that somebody names."""
        self.last = 0
        """The place of the last cluster of data, in guest order."""

    def run(self) -> None:
        mapping, header = self.mapping, self.mapping.header
        self.result.total_clusters = -(-header.image_size // self.unit)
        self._claim(0, header.header_bytes)
        self._claim(header.l1_table_offset, header.table_bytes)
        per_table = header.table_entries
        # Entries behind the end of the disk count too: a disk that grows shows what they name.
        for index in mapping.tables.l2_indices():
            if self._table(index):
                for start, _, entries in mapping.tables.runs(index * per_table, per_table):
                    if entries is not None:
                        self._entries(start, np.array(entries, dtype=np.uint64))
        self._leaks()

    def _claim(self, offset: int, length: int) -> bool:
        """False: somebody names a part of it already."""
        part = self.named[offset // self.unit : (offset + length) // self.unit]
        if part.any():
            return False
        part[:] = True
        return True

    def _table(self, index: int) -> bool:
        """Whether an L1 entry names an L2 table that can be looked at."""
        tables, length = self.mapping.tables, self.mapping.header.table_bytes
        try:
            table = tables.l2_table(index)
        except ImageCorrupt as error:
            self.report(f"ERROR: {error} (L1 entry {index})")
            sound = False
        else:
            if not table:
                return False
            sound = self._claim(table, length)
            if not sound:
                self.report(f"ERROR: L2 table {table:#x} is used twice (L1 entry {index})")
        if sound:
            return True
        if self._repairs():
            tables.set_l1(index, 0)
        return False

    def _repairs(self) -> bool:
        """Something is wrong, whose repair is to name nothing: whether that is wanted."""
        if self.fix.leaks or self.fix.errors:
            self.result.corruptions_fixed += 1
            return True
        self.result.corruptions += 1
        return False

    def _entries(self, first: int, entries: npt.NDArray[np.uint64]) -> None:
        unit, mapping = self.unit, self.mapping
        held = np.flatnonzero(entries > ZERO_CLUSTER)
        if not len(held):
            return
        places = entries[held]
        self._statistics(places)
        sound = (places % unit == 0) & (places >= mapping.header.header_bytes)
        sound &= places < mapping.appender.end
        for place in np.flatnonzero(~sound):
            cluster = first + int(held[place])
            self.report(
                f"ERROR: cluster offset {int(places[place]):#x} is invalid "
                f"(guest offset {cluster * unit:#x})"
            )
            if self._repairs():
                mapping.tables.set_entry(cluster, 0)
        held, numbers = held[sound], (places[sound] // unit).astype(np.int64)
        # Neither named before nor twice in this very run: the first one may keep its place.
        once = np.zeros(len(numbers), dtype=bool)
        once[np.unique(numbers, return_index=True)[1]] = True
        once &= ~self.named[numbers]
        self.named[numbers] = True
        for place in np.flatnonzero(~once):
            self._used_twice(first + int(held[place]), int(numbers[place]) * unit)

    def _used_twice(self, cluster: int, place: int) -> None:
        self.report(
            f"ERROR: cluster {place:#x} is used twice (guest offset {cluster * self.unit:#x})"
        )
        if not self.fix.errors:
            self.result.corruptions += 1
            return
        # Nobody knows whose it is: each gets what is there.
        mapping = self.mapping
        copy, _ = mapping.appender.take(self.unit, self.unit)
        mapping.appender.reach(mapping.appender.end)
        mapping.file.write(copy, mapping.file.read(place, self.unit))
        mapping.metadata.data_written(mapping.file)
        mapping.tables.set_entry(cluster, copy)
        mapping.metadata.relieve()
        self.result.corruptions_fixed += 1

    def _statistics(self, places: npt.NDArray[np.uint64]) -> None:
        self.result.allocated_clusters += len(places)
        before = np.concatenate(([np.uint64(self.last)], places[:-1]))
        apart = (before != 0) & (places != before + np.uint64(self.unit))
        self.result.fragmented_clusters += int(np.count_nonzero(apart))
        self.last = int(places[-1])

    def _leaks(self) -> None:
        leaks = self.clusters - int(np.count_nonzero(self.named))
        mapping = self.mapping
        untouched = mapping.appender.end == self.clusters * self.unit
        if leaks and self.fix.leaks and untouched and not self.result.corruptions:
            end = self.clusters - int(self.named[::-1].argmax())
            fixed = self.clusters - end
            if fixed:
                # No table names the tail on storage either before it goes.
                mapping.metadata.commit()
                mapping.metadata.barrier()
                mapping.appender.end = end * self.unit
                mapping.appender.trim()
                self.result.leaks_fixed = fixed
                leaks -= fixed
        self.result.leaks = leaks
