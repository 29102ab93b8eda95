"""Checking an image: are its refcounts what its tables say, and its tables what they must be?

The order is that of ``qemu-img check``: references are counted (``references``) and compared with
the refcounts that the image keeps (``stored``), then COPIED flags with the counts (``copied``).
What may be repaired is repaired in an order that makes no power cut worse than the damage was, with
a flush between the steps:

1. entries that name no usable place are mended while they are counted: space may leak;
2. counts that are too low are raised, or the refcount structure is built anew (``repair``);
3. COPIED flags are made to agree;
4. counts that are too high are lowered: the leaks end;
5. the dirty and the corrupt bit are cleared.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import numpy as np

from lamina.block.driver import CheckResult, Fix
from lamina.errors import StorageError
from lamina.formats.qcow2.arrays import (
    Counts,
    Indices,
    count_type,
)
from lamina.formats.qcow2.census import WINDOW, Census
from lamina.formats.qcow2.copied import check_copied
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.refblock import Width
from lamina.formats.qcow2.references import Walk
from lamina.formats.qcow2.repair import rebuild
from lamina.formats.qcow2.snapshot_check import SnapshotCheck
from lamina.formats.qcow2.snapshot_layout import Snapshot, snapshot_table_length
from lamina.formats.qcow2.stored import CountRun, StoredCounts, WindowCounts
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.bitmap_layout import BitmapEntry
    from lamina.formats.qcow2.mapping import Qcow2Mapping

_OVERFLOW_LINES = 100
"""A single cluster may have millions of references too many; no need to say it so often."""
_OVERFLOW_HINT = (
    "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean "
    "copy if the image cannot be opened for writing"
)


def check(mapping: Qcow2Mapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """Check the image behind ``mapping`` and repair what ``fix`` allows.

    Nobody else may use the disk meanwhile. Raises StorageError if the image cannot be read or
    written, and (EIO) where leaks alone were to be repaired but no refcount can be relied upon.
    """
    if not mapping.read_only:
        mapping.metadata.commit(counts=True)
        mapping.metadata.barrier()
    image = ImageCheck(mapping.file, mapping.header, fix, report)
    try:
        result = image.run()
        if image.rebuilt and result.corruptions:
            # Tables that lay on the old refcount structure were not to be written to.
            fixed, leaks_fixed = result.corruptions_fixed, result.leaks_fixed
            image = ImageCheck(mapping.file, mapping.header, fix, report)
            result = image.run()
            result.corruptions_fixed += fixed
            result.leaks_fixed += leaks_fixed
    finally:
        if fix.leaks or fix.errors:
            mapping.reload()
    # A table that lies outside of the file was itself a corruption.
    outside = int(image.snapshot_table_is_outside)
    if image.mended_snapshots and result.corruptions == outside:
        from lamina.formats.qcow2.snapshotting import rewrite_table

        rewrite_table(mapping, image.snapshots)
        result.corruptions -= outside
        result.corruptions_fixed += outside
    if fix.errors and image.bitmap_damages:
        if result.corruptions:
            # Nothing can be written: the damaged ones stay where they are.
            result.corruptions += image.bitmap_damages
            result.corruptions_fixed -= image.bitmap_damages
        else:
            from lamina.formats.qcow2.bitmaps import keep_only

            keep_only(mapping, image.kept_bitmaps)
    if (fix.leaks or fix.errors) and not (
        result.corruptions or result.check_errors or result.leaks
    ):
        from lamina.formats.qcow2.header import mark_repaired

        mark_repaired(mapping)
    return result


class Difference(NamedTuple):
    """Clusters whose refcount is not what it has to be."""

    clusters: Indices
    stored: Counts
    counted: Counts

    def rows(self) -> Iterator[tuple[int, int, int]]:
        return zip(
            self.clusters.tolist(), self.stored.tolist(), self.counted.tolist(), strict=True
        )


class ImageCheck:
    """One run over one image; hears what its parts find (``references.Findings``)."""

    def __init__(
        self, file: Node, header: Header, fix: Fix, report: Callable[[str], None]
    ) -> None:
        self.file = file
        self.header = header
        self.fix = fix
        self.report = report
        self.mends = fix.errors
        self.result = CheckResult(total_clusters=-(-header.size // header.cluster_size))
        # Tables may reach into the cluster right behind the end of the file.
        self.clusters = (-(-file.size // header.cluster_size)) + 1
        """Of the file."""
        self.snapshots: list[Snapshot] = []
        self.mended_snapshots = False
        """The snapshot table has to be written as ``snapshots`` say."""
        self.bitmap_damages = 0
        """If there are any, the bitmap directory has to be written as ``kept_bitmaps`` say."""
        self.kept_bitmaps: list[BitmapEntry] = []
        self._width = Width(header.refcount_order)
        self._counter = count_type(header.refcount_order)
        self.rebuilt = False
        """There is a new refcount structure."""
        self._rebuilds = False
        self._structure_corruptions = 0
        self._highest = 0
        """The last cluster that is in use."""
        self._largest = 0
        """The highest refcount that the image keeps."""
        self._counted: tuple[Census, Walk] | None = None
        """The only window's, where one is enough."""
        self._last_window: Census | None = None

    # -- what the parts find -----------------------------------------------------------------------

    def corruption(self, message: str, *, mended: bool = False) -> None:
        self.report(("Repairing" if mended else "ERROR") + message)
        if mended:
            self.result.corruptions_fixed += 1
        else:
            self.result.corruptions += 1

    def structure_corruption(self, message: str, *, mended: bool = False) -> None:
        self.corruption(message, mended=mended)
        self._structure_corruptions += not mended
        self._rebuilds = True

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> CheckResult:
        header, result, fix = self.header, self.result, self.fix
        table = SnapshotCheck(self)
        self.snapshots = table.run()
        self.mended_snapshots = table.mended
        walk, differences = self._compare_all()
        self.bitmap_damages = walk.bitmaps.damages if walk.l1_usable else 0
        self.kept_bitmaps = walk.bitmaps.kept
        if walk.wrote:
            self.file.flush()
        stored = StoredCounts(self.file, header, walk.block_table)
        if (fix.errors or fix.leaks) and not walk.l1_usable:
            self.report("ERROR the active L1 table cannot be used; nothing is repaired")
            fix = self.fix = Fix()
        if self._rebuilds and fix.errors:
            stored, differences = self._rebuild(walk, differences)
        elif self._rebuilds and fix.leaks:
            self.report("ERROR need to rebuild refcount structures")
            raise StorageError.from_errno(errno.EIO)
        elif fix.errors or fix.leaks:
            self._report_repairs(differences)
        if fix.errors:
            self._adjust(stored, differences, upwards=True)
        if not (walk.all_copied and self._largest <= 1) or differences or result.corruptions:
            # Not obvious from what was seen already: look at every flag.
            self._check_copied(stored, differences)
        if fix.leaks:
            self._adjust(stored, differences, upwards=False)
        statistics = walk.statistics
        result.allocated_clusters = statistics.allocated
        result.fragmented_clusters = statistics.fragmented
        result.compressed_clusters = statistics.compressed
        result.image_end_offset = (self._highest + 1) << header.cluster_bits
        return result

    @property
    def snapshot_table_is_outside(self) -> bool:
        end = self.header.snapshots_offset + snapshot_table_length(self.snapshots)
        return bool(self.snapshots) and end - self.file.size >= self.header.cluster_size

    # -- counting and comparing --------------------------------------------------------------------

    def _count(self, first: int, *, first_pass: bool = False) -> tuple[Census, Walk]:
        """Count the references to the clusters of the window that begins at ``first``."""
        if self._counted is not None:
            return self._counted
        census, walk = self._walk(first, first_pass)
        while not census.is_exact():
            # A cluster with more references than the width of its refcount allows for.
            self._counter = np.uint64 if self._counter is np.uint32 else np.uint32
            census, _ = self._walk(first, False)
        if self.clusters <= WINDOW:
            self._counted = census, walk
        return census, walk

    def _walk(self, first: int, first_pass: bool) -> tuple[Census, Walk]:
        census = Census(first, min(WINDOW, self.clusters - first), self._counter)
        walk = Walk(self.file, self.header, self.snapshots, census, self, first_pass=first_pass)
        walk.run()
        return census, walk

    def _compare_all(self) -> tuple[Walk, list[Difference]]:
        """Count and compare all clusters of the file; the first walk over the tables."""
        census, walk = self._count(0, first_pass=True)
        stored = StoredCounts(self.file, self.header, walk.block_table)
        windows = census.windows | {
            block * stored.per_block // WINDOW for block in np.flatnonzero(stored.table).tolist()
        }
        differences = []
        for window in sorted(windows | {0}):
            first = window * WINDOW
            if first < self.clusters:
                if window:
                    census, _ = self._count(first)
                self._cut_to_width(census)
                differences += self._compare(census, stored)
        return walk, differences

    def _cut_to_width(self, census: Census) -> None:
        """Report references that no refcount of this image can count."""
        maximum = self._width.maximum
        if maximum >= np.iinfo(census.counts.dtype).max or int(census.counts.max()) <= maximum:
            return
        for index in np.flatnonzero(census.counts > maximum).tolist():
            offset = (census.first + index) << self.header.cluster_bits
            surplus = int(census.counts[index]) - maximum
            self.result.corruptions += surplus
            for _ in range(min(surplus, _OVERFLOW_LINES)):
                self.report(f"ERROR: overflow cluster offset={offset:#x}")
                self.report(_OVERFLOW_HINT)
            census.counts[index] = maximum

    def _compare(self, census: Census, stored: StoredCounts) -> list[Difference]:
        """Report every cluster of a window whose refcount is wrong."""
        differences = []
        first = census.first
        used: CountRun | None = None
        end = first + len(census.counts)
        if end == self.clusters and not census.counts[-1]:
            # Nobody needs what lies behind the end of the file, so it cannot leak.
            end -= 1
            self.clusters -= 1
        for run in stored.runs(first, end):
            counted = census.counts[run.first - first : run.end - first]
            if run.counts is None:
                wrong = np.flatnonzero(counted)
                counts = np.zeros(len(wrong), dtype=counted.dtype)
            else:
                wrong = np.flatnonzero(run.counts != counted)
                counts = run.counts[wrong]
                self._largest = max(self._largest, int(run.counts.max()))
            if len(wrong):
                one = Difference(wrong + run.first, counts, counted[wrong])
                self._report_difference(one)
                differences.append(one)
                self._highest = max(self._highest, int(one.clusters[-1]))
            if run.counts is not None and run.counts.any():
                used = run
        if used is not None and used.counts is not None:
            last = len(used.counts) - 1 - int(np.argmax(used.counts[::-1] != 0))
            self._highest = max(self._highest, used.first + last)
        return differences

    def _report_difference(self, difference: Difference) -> None:
        result = self.result
        for cluster, stored, counted in difference.rows():
            if stored > counted:
                self.report(f"Leaked cluster {cluster} refcount={stored} reference={counted}")
                result.leaks += 1
            else:
                self.report(f"ERROR cluster {cluster} refcount={stored} reference={counted}")
                result.corruptions += 1
        # A free cluster that is in use may have been given away: no refcount can be believed.
        self._rebuilds |= bool((difference.stored == 0).any())

    # -- repairing ---------------------------------------------------------------------------------

    def _report_repairs(self, differences: list[Difference]) -> None:
        result = self.result
        for difference in differences:
            for cluster, stored, counted in difference.rows():
                leaked = stored > counted
                repaired = self.fix.leaks if leaked else self.fix.errors
                self.report(
                    f"{'Repairing' if repaired else 'ERROR'} cluster {cluster} "
                    f"refcount={stored} reference={counted}"
                )
                if repaired and leaked:
                    result.leaks -= 1
                    result.leaks_fixed += 1
                elif repaired:
                    result.corruptions -= 1
                    result.corruptions_fixed += 1

    def _adjust(
        self, stored: StoredCounts, differences: list[Difference], *, upwards: bool
    ) -> None:
        """Write the refcounts that have to rise, or those that have to fall."""
        changed = False
        for clusters, before, after in differences:
            which = (after > before) == upwards
            if which.any():
                stored.put(clusters[which], after[which])
                changed = True
        if self.fix.errors and not upwards and not self._rebuilds:
            # Nothing refers to what lies behind the end any more: it would leak as the file grows.
            changed |= stored.clear_from(self.clusters)
        if changed:
            self.file.flush()

    def _rebuild(
        self, walk: Walk, differences: list[Difference]
    ) -> tuple[StoredCounts, list[Difference]]:
        """Replace the refcount structure; what is left to do is to give the old one back."""
        self.report("Rebuilding refcount structure")
        result = self.result
        end = self._highest + 1
        table, clusters = rebuild(self.file, self.header, end, self._counts_of)
        self._highest += clusters
        self.rebuilt = True
        leaks = sum(int((one.stored > one.counted).sum()) for one in differences)
        errors = sum(len(one.clusters) for one in differences) - leaks
        errors += self._structure_corruptions
        result.leaks -= leaks
        result.leaks_fixed += leaks
        result.corruptions -= errors
        result.corruptions_fixed += errors
        stored = StoredCounts(self.file, self.header, table)
        old, uses = np.unique(walk.structure, return_counts=True)
        counts = stored.get(old)
        left = counts - np.minimum(counts, uses.astype(counts.dtype))
        given_back = Difference(old, counts, left)
        for cluster, before, after in given_back.rows():
            self.report(f"Repairing cluster {cluster} refcount={before} reference={after}")
        return stored, [given_back]

    def _counts_of(self, first: int, end: int) -> Counts | None:
        """The references that were counted, for ``rebuild``."""
        window = first // WINDOW * WINDOW
        if self._last_window is None or self._last_window.first != window:
            self._last_window = None
            self._last_window, _ = self._count(window)
            np.minimum(
                self._last_window.counts, self._width.maximum, out=self._last_window.counts
            )
        counts = self._last_window.counts[first - window : end - window]
        if not counts.any():
            return None
        return np.pad(counts, (0, end - first - len(counts)))

    # -- COPIED ------------------------------------------------------------------------------------

    def _check_copied(self, stored: StoredCounts, differences: list[Difference]) -> None:
        fix, result = self.fix, self.result
        sound = not (result.corruptions or result.check_errors)
        fixes = fix.errors or (fix.leaks and sound)
        wrote = False
        for first in range(0, self.clusters, WINDOW):
            end = min(first + WINDOW, self.clusters)
            counts = WindowCounts(stored, first, end, self.clusters)
            for clusters, before, after in differences:
                # What the counts will be, once those that may change have changed.
                changes = np.where(after > before, fix.errors, fix.leaks)
                counts.change(clusters[changes], after[changes])
            wrote |= check_copied(self.file, self.header, counts, self, fixes=fixes)
        if wrote:
            self.file.flush()
