"""Taking and giving back host clusters.

Space is searched from the front. Runs are contiguous, so that sequential guest data becomes
sequential in the file; a search never reads more than the refcount blocks on its way. Where a block
is missing, all clusters that it would count are free, and the new block takes the first of them:
it counts itself.

What was never published is given back at once (``cancel``); what tables named until now is given
back when no table on disk names it any more (``free_later``).
"""

from __future__ import annotations

import enum
import errno
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lamina.engine.metadata import Metadata, Stage
from lamina.errors import LaminaError, StorageError
from lamina.formats.qcow2.layout import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE
from lamina.formats.qcow2.refcounts import to_big_endian
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.engine.tables import TableCache
    from lamina.formats.qcow2.corruption import Corruption
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.options import Options
    from lamina.formats.qcow2.overlap import Overlap
    from lamina.formats.qcow2.refcounts import Refcounts


class Cause(enum.Enum):
    """Why space is given back: decides whether the file is told to discard it."""

    REQUEST = "request"
    SNAPSHOT = "snapshot"
    OTHER = "other"


class Freed(NamedTuple):
    """A run of host clusters that lost one reference each."""

    first: int
    clusters: int
    cause: Cause = Cause.OTHER


class Allocator:
    def __init__(
        self,
        file: Node,
        header: Header,
        metadata: Metadata,
        refcounts: Refcounts,
        overlap: Overlap,
        corruption: Corruption,
    ) -> None:
        self.file = file
        self.header = header
        self.metadata = metadata
        self.refcounts = refcounts
        self.overlap = overlap
        self.corruption = corruption
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.pass_discard: frozenset[Cause] = frozenset()
        self.l2_cache: TableCache | None = None
        """Told when clusters stop being tables."""
        self._hint = 0
        """No cluster before this one is free, as far as is known."""
        self._run_hint = 0
        """Where searches for several clusters start: behind gaps that were too small."""
        self._byte_cursor = 0
        """Host offset behind the latest compressed data; 0: none that could go on."""

    def configure(self, options: Options, *, unmap: bool) -> None:
        request = options.pass_discard_request
        self.pass_discard = frozenset(
            cause
            for cause, wanted in (
                (Cause.REQUEST, unmap if request is None else request),
                (Cause.SNAPSHOT, options.pass_discard_snapshot),
                (Cause.OTHER, options.pass_discard_other),
            )
            if wanted
        )

    def restart(self) -> None:
        """Forget what is known about free space."""
        self._hint = self._run_hint = self._byte_cursor = 0

    @contextmanager
    def starting_at(self, host_offset: int) -> Iterator[None]:
        """Allocate from here on, whatever is free before."""
        hint = self._hint
        self._hint = self._run_hint = host_offset >> self.cluster_bits
        try:
            yield
        finally:
            self._hint = min(hint, self._hint)

    def last_used(self) -> int:
        """The last cluster that is counted. Raises StorageError or ImageCorrupt."""
        refcounts = self.refcounts
        table = refcounts.table
        for index in range(len(table) - 1, -1, -1):
            block = refcounts.block(index) if table[index] else None
            if block is not None:
                place = refcounts.width.last_used(block)
                if place >= 0:
                    return index * refcounts.per_block + place
        return 0

    # -- taking ----------------------------------------------------------------------------------

    def allocate(self, count: int, what: str = "") -> int:
        """Host offset of ``count`` free clusters in a row; they are counted already.

        ``what`` they are for, if not for data.
        """
        self.file.event("cluster_alloc")
        if count == 1:
            first = self._free_behind(self._hint)
        else:
            first = self._search_run(count, max(self._hint, self._run_hint))
        return self._take(first, count, what)

    def allocate_at(self, host_offset: int, count: int) -> int:
        """How many of the ``count`` clusters from ``host_offset`` on were free: they are counted
        now."""
        first = host_offset >> self.cluster_bits
        free = self._free_at(first, count)
        if free:
            self.file.event("cluster_alloc")
            self._take(first, free, "")
        return free

    def _free_at(self, first: int, count: int) -> int:
        """Free clusters in a row from ``first`` on, ``count`` at most."""
        refcounts = self.refcounts
        free = 0
        while free < count:
            index, place = divmod(first + free, refcounts.per_block)
            part = min(count - free, refcounts.per_block - place)
            block = refcounts.block(index)
            if block is not None:
                end = refcounts.width.next_used(block, place, place + part)
                if end < place + part:
                    return free + end - place
            free += part
        return free

    def allocate_table(self, count: int, what: str) -> int:
        """The same for metadata: gaps in front are looked at again."""
        if count == 1:
            return self.allocate(1, what)
        self.file.event("cluster_alloc")
        return self._take(self._search_run(count, self._hint), count, what)

    def allocate_behind(self, count: int, what: str) -> int:
        """The same for what is to stay together although it is allocated bit by bit: gaps that were
        too small for the latest runs are left for others."""
        self.file.event("cluster_alloc")
        lowest = self._hint
        start = max(lowest, self._run_hint)
        first = self._free_behind(start) if count == 1 else self._search_run(count, start)
        offset = self._take(first, count, what)
        if start > lowest:
            self._hint = lowest
        return offset

    def allocate_bytes(self, length: int) -> int:
        """Host offset of ``length`` bytes, less than a cluster, for compressed data.

        It goes right behind the compressed data before it where possible; each cluster that it
        touches counts one reference more.
        """
        self.file.event("cluster_alloc_bytes")
        cluster_size = self.cluster_size
        cursor = self._byte_cursor
        used = cursor % cluster_size
        current = cursor >> self.cluster_bits
        if used and self.refcounts.get(current) >= self.refcounts.width.maximum:
            used = 0
        if used and length <= cluster_size - used:
            self.refcounts.add(current, 1)
        else:
            offset = self.allocate(1)
            if used and offset >> self.cluster_bits == current + 1:
                try:
                    self.refcounts.add(current, 1)
                except LaminaError:
                    self.cancel(offset, 1)
                    raise
            else:
                cursor = offset
        self._byte_cursor = cursor + length
        return cursor

    def _take(self, first: int, count: int, what: str) -> int:
        offset = first << self.cluster_bits
        if (first + count) << self.cluster_bits > MAX_HOST_OFFSET:
            raise StorageError.from_errno(errno.EFBIG)
        if offset or not what:
            self.overlap.check(offset, count << self.cluster_bits)
        if not offset:
            # The header is there: the counts are wrong.
            raise self.corruption.found(
                f"Preventing invalid allocation of {what or 'data cluster'} at offset 0",
                structure="refcounts",
            )
        self.file.event("refblock_alloc")
        self._ensure_blocks(first, count)
        self.refcounts.add(first, count)
        if count == 1:
            self._hint = first + 1
        self._run_hint = max(first + count, self._hint)
        return offset

    def _search_run(self, count: int, start: int) -> int:
        """First cluster of ``count`` free ones in a row; their refcount blocks may be missing."""
        refcounts = self.refcounts
        width, per_block = refcounts.width, refcounts.per_block
        cluster = start
        while cluster - start < count:
            index, place = divmod(cluster, per_block)
            if index >= len(refcounts.table):
                break
            block = refcounts.block(index)
            if block is None:
                cluster += per_block - place
                continue
            if cluster == start:
                place = width.next_free(block, place)
                start = cluster = index * per_block + place
                if place == per_block:
                    continue
            wanted = place + count - (cluster - start)
            end = width.next_used(block, place, wanted)
            cluster = index * per_block + end
            if end < min(wanted, per_block):
                # In use from here on: this gap was too small.
                start = cluster
        return start

    # -- refcount blocks and the refcount table --------------------------------------------------

    def _ensure_blocks(self, first: int, count: int) -> None:
        """Make the refcount blocks of a free run, outside of the run."""
        per_block = self.refcounts.per_block
        behind = first + count
        for index in range(first // per_block, (behind - 1) // per_block + 1):
            if not self.refcounts.block_offset(index):
                self._grow_table(index, behind)
                behind = self._free_behind(behind)
            if not self.refcounts.block_offset(index):
                self._new_block(index, behind)

    def _free_behind(self, cluster: int) -> int:
        """The first free cluster from ``cluster`` on; the block that counts it exists then."""
        refcounts = self.refcounts
        per_block = refcounts.per_block
        while True:
            index, place = divmod(cluster, per_block)
            self._grow_table(index, cluster)
            block = refcounts.block(index)
            if block is None:
                self._new_block(index, cluster)
                continue
            place = refcounts.width.next_free(block, place)
            cluster = index * per_block + place
            if place < per_block:
                return cluster

    def _new_block(self, index: int, cluster: int) -> None:
        """Put the refcount block ``index`` at ``cluster``, which it counts itself or whose count
        another block keeps."""
        offset = cluster << self.cluster_bits
        if not offset:
            raise self.corruption.found(
                "Preventing invalid allocation of refcount block at offset 0",
                structure="refcount table",
            )
        self.overlap.check(offset, self.cluster_size)
        self._publish_block(index, offset)
        # It has its room; what it counts is yet to be written.
        self.file.event("refblock_alloc_write")
        self.refcounts.add(cluster, 1)

    def _publish_block(self, index: int, offset: int) -> None:
        refcounts = self.refcounts
        refcounts.cache.new(offset, at_once=True)
        refcounts.table[index] = offset
        self.overlap.add_refcount_block(offset)
        self.metadata.put(
            Stage.COUNT_ROOTS,
            self.header.refcount_table_offset + index * 8,
            offset.to_bytes(8, "big"),
            event="refblock_alloc_hookup",
        )

    def _grow_table(self, index: int, behind: int) -> None:
        """Make the refcount table long enough for block ``index``.

        Nothing is counted from the cluster ``behind`` on: there comes the block that counts it. The
        new table, with the blocks that count it and more for the time to come, lies behind what
        that block counts.
        """
        refcounts, header = self.refcounts, self.header
        if index < len(refcounts.table):
            return
        self.file.event("reftable_grow")
        home = behind // refcounts.per_block
        start = (home + 1) * refcounts.per_block
        blocks, table_clusters = self._table_for(start)
        if table_clusters << self.cluster_bits > MAX_REFCOUNT_TABLE:
            raise StorageError.from_errno(errno.EFBIG)
        blocks -= home + 1
        table_offset = (start + blocks) << self.cluster_bits
        places = [behind, *range(start, start + blocks)]
        for place in places:
            self.overlap.check(place << self.cluster_bits, self.cluster_size)
        self.overlap.check(table_offset, table_clusters << self.cluster_bits)
        # Nothing has changed yet if the storage has no room for all of it.
        for place in places:
            self.file.write(place << self.cluster_bits, bytes(self.cluster_size))
        self.file.write(table_offset, bytes(table_clusters << self.cluster_bits))
        table = array("Q", refcounts.table)
        table.extend([0] * (table_clusters * (self.cluster_size // 8) - len(table)))
        old_offset, old_clusters = header.refcount_table_offset, header.refcount_table_clusters
        refcounts.table = table
        header.refcount_table_offset = table_offset
        header.refcount_table_clusters = table_clusters
        self.overlap.add_refcount_table()
        self.file.event("refblock_alloc_write_blocks")
        for number, place in enumerate(places, home):
            offset = place << self.cluster_bits
            refcounts.cache.new(offset)
            table[number] = offset
            self.overlap.add_refcount_block(offset)
        refcounts.add(behind, 1)
        refcounts.add(start, blocks + table_clusters)
        # Entries that were on their way into the old table are part of the new one.
        self.metadata.forget(old_offset, old_clusters << self.cluster_bits)
        self.metadata.put(
            Stage.COUNTS, table_offset, to_big_endian(table), event="refblock_alloc_write_table"
        )
        self.metadata.put(
            Stage.COUNT_ROOTS,
            48,
            table_offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big"),
            event="refblock_alloc_switch_table",
        )
        self.free_later([Freed(old_offset >> self.cluster_bits, old_clusters)])
        # This is rare, and the old table makes room for what is wanted now.
        self.metadata.commit(counts=True)

    def _table_for(self, clusters: int) -> tuple[int, int]:
        """(blocks, clusters of the table) that count so many clusters, themselves as well, with
        half as many entries again to spare."""
        per_block = self.refcounts.per_block
        per_cluster = self.cluster_size // 8
        blocks = table = 1
        while blocks < (needed := -(-(clusters + blocks + table) // per_block)):
            blocks, table = needed, -(-needed // per_cluster)
        table = -(-(blocks + blocks // 2) // per_cluster)
        while blocks < (needed := -(-(clusters + blocks + table) // per_block)):
            blocks = needed
        return blocks, table

    # -- giving back -----------------------------------------------------------------------------

    def cancel(self, host_offset: int, count: int) -> None:
        """Give back clusters that nothing ever named. Never raises."""
        self._drop(host_offset >> self.cluster_bits, count, Cause.OTHER, Stage.COUNTS)

    def cancel_bytes(self, host_offset: int, length: int) -> None:
        """Give back what ``allocate_bytes`` took. Never raises."""
        first = host_offset >> self.cluster_bits
        last = (host_offset + length - 1) >> self.cluster_bits
        self._drop(first, last - first + 1, Cause.OTHER, Stage.COUNTS)

    def free_later(self, runs: Sequence[Freed]) -> None:
        """Give these clusters back once no table on disk names them and nobody reads them."""
        if runs:
            merged = _merge(runs)
            self.metadata.when_durable(lambda: self._free(merged))

    def _free(self, runs: Sequence[Freed]) -> None:
        for run in runs:
            self._drop(run.first, run.clusters, run.cause, Stage.FREES)

    def _drop(self, first: int, count: int, cause: Cause, stage: Stage) -> None:
        self.file.event("cluster_free")
        try:
            free = self.refcounts.drop(first, count, stage)
        except LaminaError as error:
            # The clusters stay counted: a leak, which a check finds.
            self.corruption.warn(f"qcow2_free_clusters failed: {error}")
            return
        for start, length in free:
            self._hint = min(self._hint, start)
            self._run_hint = min(self._run_hint, start)
            if start <= self._byte_cursor >> self.cluster_bits < start + length:
                self._byte_cursor = 0
            offset = start << self.cluster_bits
            self.overlap.remove(offset, length << self.cluster_bits)
            self._forget_tables(start, length)
            if cause in self.pass_discard:
                self.discard_below(offset, length << self.cluster_bits)

    def _forget_tables(self, first: int, count: int) -> None:
        for cluster in range(first, first + count):
            self.refcounts.cache.drop(cluster << self.cluster_bits)
        if self.l2_cache is not None:
            step = self.l2_cache.table_bytes
            start = first << self.cluster_bits
            for offset in range(start, start + (count << self.cluster_bits), step):
                self.l2_cache.drop(offset)

    def drop_empty_blocks(self) -> None:
        """Give back the refcount blocks that count nothing but, maybe, themselves.

        The block that counts another one may become empty with it, hence the rounds.
        """
        while self._drop_some_blocks():
            self.metadata.commit(counts=True)
            self.metadata.barrier()

    def _drop_some_blocks(self) -> bool:
        refcounts = self.refcounts
        counted_elsewhere: list[Freed] = []
        dropped = False
        for index in range(len(refcounts.table)):
            block = refcounts.block(index) if refcounts.table[index] else None
            if block is None:
                continue
            offset = refcounts.block_offset(index)
            cluster = offset >> self.cluster_bits
            counts_itself = cluster // refcounts.per_block == index
            if refcounts.width.count_used(block) > counts_itself:
                continue
            dropped = True
            refcounts.table[index] = 0
            place = self.header.refcount_table_offset + index * 8
            self.metadata.put(Stage.ROOTS, place, bytes(8))
            if counts_itself:
                self.overlap.remove(offset, self.cluster_size)
                refcounts.cache.drop(offset)
            else:
                counted_elsewhere.append(Freed(cluster, 1))
        self.free_later(counted_elsewhere)
        return dropped

    def discard_below(self, host_offset: int, length: int) -> None:
        """The file need not keep these bytes. A hint: its failure changes nothing."""
        length = min(length, self.file.size - host_offset)
        if length > 0:
            try:
                self.file.discard(host_offset, length)
            except LaminaError:
                return


def _merge(runs: Sequence[Freed]) -> list[Freed]:
    """Neighbours of the same cause as one run, in the order given."""
    merged: list[Freed] = []
    for run in runs:
        if merged:
            last = merged[-1]
            if last.first + last.clusters == run.first and last.cause is run.cause:
                merged[-1] = Freed(last.first, last.clusters + run.clusters, run.cause)
                continue
        merged.append(run)
    return merged
