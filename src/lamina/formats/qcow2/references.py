"""How often the tables of an image refer to each cluster of its file.

``Walk`` goes through everything that an image is made of, in the order of ``qemu-img check``, hands
each reference to a ``Census`` and each inconsistency to whoever asked. It believes nothing: tables
may lie anywhere, overlap, and repeat each other.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from lamina.formats.qcow2.arrays import (
    Indices,
    TableRun,
    Words,
    read_tables,
    read_words,
    straight_tables,
)
from lamina.formats.qcow2.bitmap_check import BitmapWalk
from lamina.formats.qcow2.census import Census, count_uses
from lamina.formats.qcow2.entries import Entries, Trouble, beyond
from lamina.formats.qcow2.layout import (
    COPIED,
    INCOMPAT_DATA_FILE,
    L1_RESERVED,
    MAX_L1,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
    Header,
)
from lamina.formats.qcow2.regions import Regions, is_l1_usable, protected_regions
from lamina.formats.qcow2.snapshot_layout import Snapshot, snapshot_table_length
from lamina.hints import TYPE_CHECKING, Protocol
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.node import Node

class Findings(Protocol):
    """Who hears of inconsistencies, in order."""

    mends: bool
    """Entries of L1 and L2 tables are to be mended as they are met."""

    def corruption(self, message: str, *, mended: bool = False) -> None:
        """``message``: what follows "ERROR"."""

    def structure_corruption(self, message: str, *, mended: bool = False) -> None:
        """The same; it means that the refcount table or its blocks cannot be relied upon."""


@dataclass
class Statistics:
    """Of the active disk, in clusters."""

    allocated: int = 0
    fragmented: int = 0
    """Not where the cluster before them ends."""
    compressed: int = 0


class Walk:
    """One pass over all tables of an image."""

    def __init__(
        self,
        file: Node,
        header: Header,
        snapshots: list[Snapshot],
        census: Census,
        findings: Findings,
        *,
        first_pass: bool = True,
    ) -> None:
        """All but the first pass, which count other windows, say only what is news."""
        self.file = file
        self.file_size = file.size
        self.header = header
        self.snapshots = snapshots
        self.census = census
        self.findings = findings
        self.first_pass = first_pass
        self.l1_usable = is_l1_usable(file, header, snapshots)
        """Otherwise next to nothing is known about the image, and nothing in it may change."""
        self.mends = first_pass and findings.mends and self.l1_usable
        self.bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.counts_data = not header.incompatible_features & INCOMPAT_DATA_FILE
        self.statistics = Statistics()
        self.all_copied = True
        """No entry of the active tables lacks COPIED."""
        self.structure: Indices = np.zeros(0, np.int64)
        """Clusters of the refcount table and its blocks, as counted."""
        self.block_table: Words = np.zeros(0, np.uint64)
        """The refcount table; entries that cannot be used are 0."""
        self.wrote = False
        """Tables were mended."""
        self._protected = Regions()
        self.bitmaps = BitmapWalk(self)

    def run(self) -> None:
        header = self.header
        self._protected = protected_regions(self.file, header, self.snapshots)
        self.count_region(0, self.cluster_size)
        self._l1(header.l1_table_offset, header.l1_size, active=True)
        # Several snapshots that name one L1 table would cost a walk each.
        tables = Counter((one.l1_table_offset, one.l1_size) for one in self.snapshots)
        for snapshot in self.snapshots:
            weight = tables.pop((snapshot.l1_table_offset, snapshot.l1_size), 0)
            self._snapshot_l1(snapshot, weight)
        self.count_region(header.snapshots_offset, snapshot_table_length(self.snapshots))
        if header.crypto is not None:
            self.count_region(header.crypto.offset, header.crypto.length)
        self.bitmaps.run()
        self._refcount_structure()

    # -- regions -----------------------------------------------------------------------------------

    def count_region(self, offset: int, length: int, weight: int = 1) -> bool:
        """Count the clusters of a region; False: it reaches too far behind the end of the file."""
        if not length:
            return True
        if offset + length - self.file_size >= self.cluster_size:
            for _ in range(weight):
                self.error(beyond(offset, length))
            return False
        first = offset >> self.bits
        last = (offset + length - 1) >> self.bits
        self.census.add_run(first, last - first + 1, weight)
        return True

    def error(self, message: str, *, mended: bool = False) -> None:
        if self.first_pass:
            self.findings.corruption(message, mended=mended)

    # -- L1 and L2 tables --------------------------------------------------------------------------

    def _snapshot_l1(self, snapshot: Snapshot, weight: int) -> None:
        name = f"{snapshot.id} ({snapshot.name})"
        if snapshot.l1_table_offset & (self.cluster_size - 1):
            self.error(
                f" snapshot {name} l1_offset={snapshot.l1_table_offset:#x}: "
                "L1 table is not cluster aligned; snapshot table entry corrupted"
            )
        elif snapshot.l1_size * 8 > MAX_L1:
            self.error(
                f" snapshot {name} l1_size={snapshot.l1_size:#x}: "
                "L1 table is too large; snapshot table entry corrupted"
            )
        elif weight:
            self._l1(snapshot.l1_table_offset, snapshot.l1_size, active=False, weight=weight)

    def _l1(self, offset: int, size: int, *, active: bool, weight: int = 1) -> None:
        """Count an L1 table, the L2 tables that it names and what those name."""
        if not size:
            return
        self.count_region(offset, size * 8, weight)
        # What is not there reads as zeroes; there may be a lot of it.
        l1 = read_words(self.file, offset, min(size, max(self.file_size - offset + 7, 0) // 8))
        present = np.flatnonzero(l1)
        entries = l1[present]
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        if active:
            self.all_copied &= bool(((entries & np.uint64(COPIED)) != 0).all())
        unusable = (offsets >= self.file_size) | (offsets == 0)
        unusable |= (offsets & (self.cluster_size - 1)) != 0
        foreign = self._protected.contain(offsets >> self.bits)
        alone = unusable | foreign | ((entries & np.uint64(L1_RESERVED)) != 0)
        # Several entries may name one table: it is read once, and counts as often as it is named.
        first_uses, weights = count_uses(offsets)
        weights *= weight
        changes: dict[int, int] = {}
        start = 0
        for stop in [*np.flatnonzero(alone).tolist(), len(entries)]:
            low, high = np.searchsorted(first_uses, (start, stop)).tolist()
            picked = first_uses[low:high]
            self._l2_tables(offsets[picked], weights[picked], active)
            start = stop + 1
            if stop == len(entries):
                break
            entry = int(entries[stop])
            stays = self._bad_l1_entry(entry)
            if stays != entry and self.mends:
                changes[int(present[stop])] = stays
            if not unusable[stop] and weights[stop] and (stays or not self.mends):
                one = slice(stop, stop + 1)
                self._l2_tables(offsets[one], weights[one], active, foreign=bool(foreign[stop]))
        if changes:
            for index, entry in changes.items():
                l1[index] = entry
            self._write_words(offset, l1)

    def _bad_l1_entry(self, entry: int) -> int:
        """Report what is wrong with an entry of an L1 table; what it has to be."""
        offset = entry & OFFSET_MASK
        unaligned = offset & (self.cluster_size - 1)
        if entry & L1_RESERVED:
            self.error(f" found L1 entry with reserved bits set: {entry:x}", mended=self.mends)
        if offset >= self.file_size:
            trouble = beyond(offset, self.cluster_size)
        elif unaligned:
            trouble = f" l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
        elif not offset and not entry & COPIED:
            return 0
        elif what := self._protected.vital(offset >> self.bits):
            trouble = f" l2_offset={offset:x}: Table overlaps with {what}; L1 entry corrupted"
        else:
            return entry & ~L1_RESERVED
        self.error(trouble, mended=self.mends)
        if unaligned and not self.mends:
            # The clusters that the table would lie in are in use for all anyone knows.
            self.count_region(offset, self.cluster_size)
        return 0

    def _l2_tables(
        self, offsets: Indices, weights: Indices, active: bool, foreign: bool = False
    ) -> None:
        """Count L2 tables and what they name.

        ``foreign``: they serve as something else too, so nobody may mend them.
        """
        if not len(offsets):
            return
        heavy = bool((weights > 1).any())
        clusters = offsets >> self.bits
        if heavy:
            for cluster, weight in zip(clusters.tolist(), weights.tolist(), strict=True):
                self.census.add_run(cluster, 1, weight)
        else:
            self.census.add(clusters)
        for run in read_tables(self.file, offsets, self.cluster_size):
            if heavy:
                for row in range(len(run.offsets)):
                    part = run.entries[row : row + 1]
                    alone = TableRun(run.first + row, run.offsets[row : row + 1], part)
                    self._l2_run(alone, int(weights[run.first + row]), active, foreign)
            else:
                self._l2_run(run, 1, active, foreign)

    def _l2_run(self, run: TableRun, weight: int, active: bool, foreign: bool) -> None:
        straight = straight_tables(run.entries, self.header, self.file_size)
        if straight.any():
            self._count_straight(run.entries[straight, 0], weight, active)
            if straight.all():
                return
            rest = ~straight
            run = TableRun(run.first, run.offsets[rest], run.entries[rest])
        entries = Entries(self.header, self.file_size, run.entries)
        troubles = entries.troubles() if self.first_pass else []
        if troubles and self.mends and not foreign:
            entries = self._mend(run, entries, troubles)
        else:
            for trouble in troubles:
                self.error(trouble.message)
        self._count_l2(run, entries, weight, active)

    def _count_straight(self, first_entries: Words, weight: int, active: bool) -> None:
        per_table = self.header.l2_entries
        offsets = first_entries & np.uint64(OFFSET_MASK)
        start = end = 0
        for cluster in (offsets >> np.uint64(self.bits)).tolist():
            if cluster != end:
                self.census.add_run(start, end - start, weight)
                start = cluster
            end = cluster + per_table
        self.census.add_run(start, end - start, weight)
        if active:
            self.statistics.allocated += len(offsets) * per_table * weight
            self.all_copied &= bool((offsets != first_entries).all())

    def _mend(self, run: TableRun, entries: Entries, troubles: list[Trouble]) -> Entries:
        """Write the tables of ``run`` without the troubles; what they hold now."""
        per_entry = 2 if entries.extended else 1
        flat = run.entries.reshape(-1)
        worthless = -1
        for trouble in troubles:
            if trouble.position == worthless:
                # What else was wrong with it does not matter any more.
                continue
            at = trouble.position * per_entry
            bitmap = int(flat[at + 1]) if entries.extended else 0
            self.error(trouble.message, mended=True)
            word, bitmap = entries.mended(trouble, int(flat[at]), bitmap)
            flat[at] = word
            if entries.extended:
                flat[at + 1] = bitmap
            if trouble.worthless:
                worthless = trouble.position
        rows = {trouble.position // self.header.l2_entries for trouble in troubles}
        for row in sorted(rows):
            self._write_words(int(run.offsets[row]), run.entries[row])
        return Entries(self.header, self.file_size, run.entries)

    def _count_l2(self, run: TableRun, entries: Entries, weight: int, active: bool) -> None:
        offsets = entries.offsets
        if not entries.allocated.all():
            offsets = offsets[entries.allocated]
        if active:
            self._active_statistics(run, entries, offsets, weight)
        if not self.counts_data:
            return
        shift = np.uint64(self.bits)
        if not entries.plain:
            fits = entries.inside(offsets, self.cluster_size)
            offsets = offsets[fits]
            unaligned = offsets[(offsets & np.uint64(self.cluster_size - 1)) != 0]
            # Such a cluster touches the next one too.
            self.census.add((unaligned >> shift).view(np.int64) + 1, weight)
        self.census.add((offsets >> shift).view(np.int64), weight)
        if entries.compressed is not None and entries.compressed.any():
            self._count_compressed(entries, weight)

    def _count_compressed(self, entries: Entries, weight: int) -> None:
        offset, length = entries.encoded_places()
        counted = entries.counted_compressed() & entries.inside(offset, length)
        offset, length = offset[counted], length[counted]
        shift = np.uint64(self.bits)
        first = (offset >> shift).astype(np.int64)
        last = ((offset + length - np.uint64(1)) >> shift).astype(np.int64)
        self.census.add(first, weight)
        # Never more than two clusters, except where clusters are no larger than a sector or two.
        step = first + 1
        while (more := step <= last).any():
            self.census.add(step[more], weight)
            step = step + 1

    def _active_statistics(
        self, run: TableRun, entries: Entries, offsets: Words, weight: int
    ) -> None:
        statistics = self.statistics
        statistics.allocated += len(offsets) * weight
        per_table = self.header.l2_entries
        if len(offsets) == len(entries.words):
            jumps = np.diff(offsets.reshape(-1, per_table), axis=1) != self.cluster_size
        else:
            # Whether a cluster is fragmented is asked within each table.
            table = np.flatnonzero(entries.allocated) // per_table
            jumps = (np.diff(offsets) != self.cluster_size) & (np.diff(table) == 0)
        statistics.fragmented += int(np.count_nonzero(jumps)) * weight
        words = entries.words if entries.allocated.all() else entries.words[entries.allocated]
        if len(words):
            self.all_copied &= bool(int(np.bitwise_and.reduce(words)) & COPIED)
        if entries.compressed is not None:
            compressed = int(np.count_nonzero(entries.counted_compressed())) * weight
            statistics.compressed += compressed
            # Compressed clusters are never where they could be read in one go.
            statistics.fragmented += compressed
            statistics.allocated += compressed

    # -- the refcount table and its blocks ---------------------------------------------------------

    def _refcount_structure(self) -> None:
        header, census = self.header, self.census
        offset = header.refcount_table_offset
        length = header.refcount_table_clusters << self.bits
        structure: list[int] = []
        if self.count_region(offset, length):
            first = offset >> self.bits
            structure += range(first, first + header.refcount_table_clusters)
        table = read_words(self.file, offset, length // 8)
        for index in np.flatnonzero(table).tolist():
            entry = int(table[index])
            place = entry & REFTABLE_OFFSET_MASK
            usable = not place & (self.cluster_size - 1) and place < self.file_size
            if entry & REFTABLE_RESERVED:
                self._bad_block(f" refcount table entry {index} has reserved bits set")
            elif place & (self.cluster_size - 1):
                self._bad_block(
                    f" refcount block {index} is not cluster aligned; "
                    "refcount table entry corrupted"
                )
            elif place >= self.file_size:
                self._outside_block(f" refcount block {index} is outside image")
            else:
                cluster = place >> self.bits
                structure.append(cluster)
                census.add_run(cluster, 1)
                if (count := census.get(cluster)) > 1:
                    self.findings.structure_corruption(
                        f" refcount block {index} refcount={count}"
                    )
            table[index] = place if usable else 0
        self.block_table = table
        self.structure = np.array(structure, dtype=np.int64)

    def _bad_block(self, message: str) -> None:
        if self.first_pass:
            self.findings.structure_corruption(message)

    def _outside_block(self, message: str) -> None:
        if self.mends:
            self.findings.structure_corruption(message, mended=True)
        else:
            # Nothing is lost: all that such a block could count is zero.
            self.error(message)

    # -- helpers -----------------------------------------------------------------------------------

    def _write_words(self, offset: int, words: Words) -> None:
        data = words.astype(">u8").tobytes()
        self.file.write(offset, data[: max(self.file_size - offset, 0)])
        self.wrote = True
