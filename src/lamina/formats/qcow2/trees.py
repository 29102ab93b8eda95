"""One reference more, or less, to everything that an L1 table leads to.

Snapshots share whole trees of tables and data. Their counts are changed here with arrays, straight
in the file, while nobody else uses the image and nothing of it is held back in memory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import numpy as np

from lamina.errors import ImageCorrupt, StorageError
from lamina.formats.qcow2.arrays import Counts, pack_counts, read_words
from lamina.formats.qcow2.census import WINDOW, Census
from lamina.formats.qcow2.copied import Lookup, check_copied
from lamina.formats.qcow2.layout import REFTABLE_OFFSET_MASK
from lamina.formats.qcow2.refblock import Width
from lamina.formats.qcow2.references import Walk
from lamina.formats.qcow2.stored import CountRun, StoredCounts, WindowCounts
from lamina.hints import TYPE_CHECKING
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.arrays import Indices, Mask
    from lamina.formats.qcow2.layout import Header

Discard = Callable[[int, int], None]
"""Called with host offset and length of space that lost its last reference."""


class Refusal:
    """Findings: an inconsistency on the way means that nothing may be changed."""

    mends = False

    def __init__(self, path: str) -> None:
        self._path = path

    def corruption(self, message: str, *, mended: bool = False) -> None:
        raise ImageCorrupt(
            f"Image is corrupt: {message.lstrip(': ')}",
            path=self._path,
            format="qcow2",
            structure="L1 table",
        )

    structure_corruption = corruption


class _TreeWalk(Walk):
    def count(self, l1_offset: int, l1_size: int) -> None:
        """The references of one L1 table, its own clusters included."""
        self._l1(l1_offset, l1_size, active=False)


class Tree:
    """The L2 tables and clusters of one L1 table in the file, and that table if it is shared."""

    def __init__(
        self, file: Node, header: Header, l1_offset: int, l1_size: int, *, with_l1: bool
    ) -> None:
        self.file = file
        self.header = header
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        self.with_l1 = with_l1
        entries = header.refcount_table_clusters << (header.cluster_bits - 3)
        table = read_words(file, header.refcount_table_offset, entries)
        table &= np.uint64(REFTABLE_OFFSET_MASK)
        self._stored = StoredCounts(file, header, table)
        self._maximum = Width(header.refcount_order).maximum
        # Whole bytes of counts, however narrow these are.
        self._clusters = round_up(-(-file.size // header.cluster_size) + 1, 8)
        self._only: Census | None = None

    def check(self, delta: int) -> None:
        """Raises ImageCorrupt or StorageError (EINVAL) if ``change(delta)`` were wrong."""
        for run, counted in self._windows():
            if run.counts is None:
                if counted.any():
                    raise self._corrupt("is in use without a refcount", run.first)
                continue
            if delta > 0:
                # Written so that nothing wraps: counts are unsigned.
                if bool((run.counts > self._maximum - counted).any()):
                    raise StorageError.from_errno(errno.EINVAL)
            elif bool((run.counts < counted).any()):
                raise self._corrupt("has more references than its refcount", run.first)

    def change(self, delta: int, discard: Discard | None = None) -> None:
        """Add ``delta`` (1 or -1) to the count of every reference. Durable on return."""
        for run, counted in self._windows():
            if run.counts is None or not counted.any():
                continue
            counts = run.counts + counted if delta > 0 else run.counts - counted
            self._write(run.first, run.counts, counts)
            if discard is not None:
                freed = np.flatnonzero((counts == 0) & (run.counts != 0))
                self._discard(freed + run.first, discard)
        self.file.flush()

    def _windows(self) -> Iterator[tuple[CountRun, Counts]]:
        """Stored counts and references, piece by piece."""
        for first in range(0, self._clusters, WINDOW):
            census = self._count(first)
            for run in self._stored.runs(first, first + len(census.counts)):
                part = census.counts[run.first - first : run.end - first]
                if run.counts is not None:
                    part = part.astype(run.counts.dtype)
                yield run, part

    def _count(self, first: int) -> Census:
        if self._only is not None:
            return self._only
        census = Census(first, min(WINDOW, self._clusters - first), np.uint32)
        walk = _TreeWalk(self.file, self.header, [], census, Refusal(self.file.filename))
        walk.count(self.l1_offset, self.l1_size)
        if not self.with_l1:
            low = (self.l1_offset >> self.header.cluster_bits) - first
            length = -(-self.l1_size * 8 // self.header.cluster_size)
            inside = slice(max(low, 0), max(low + length, 0))
            census.counts[inside] -= np.uint32(1)
        if self._clusters <= WINDOW:
            self._only = census
        return census

    def _write(self, first: int, before: Counts, after: Counts) -> None:
        """The blocks that changed, of a run that begins with a whole block."""
        stored = self._stored
        per_block = stored.per_block
        size = self.file.size
        writes = []
        for start in range(0, len(after), per_block):
            part = after[start : start + per_block]
            if np.array_equal(part, before[start : start + per_block]):
                continue
            place = int(stored.table[(first + start) // per_block])
            data = pack_counts(part, stored.order)
            writes.append((place, memoryview(data)[: max(size - place, 0)]))
        self.file.writev(writes)

    def _discard(self, clusters: Indices, discard: Discard) -> None:
        bits = self.header.cluster_bits
        if len(clusters):
            for run in np.split(clusters, np.flatnonzero(np.diff(clusters) != 1) + 1):
                discard(int(run[0]) << bits, len(run) << bits)

    def _corrupt(self, what: str, first: int) -> ImageCorrupt:
        return ImageCorrupt(
            f"A cluster of the snapshot {what}",
            path=self.file.filename,
            format="qcow2",
            structure="refcount block",
            offset=first << self.header.cluster_bits,
        )


class _Shared:
    """Counts as they will be once a snapshot shares everything: none is one."""

    def look_up(self, clusters: Indices) -> tuple[Counts, Mask | None]:
        return np.full(len(clusters), 2, dtype=np.uint16), None


def clear_copied(file: Node, header: Header) -> None:
    """No entry of the active tables claims that its cluster belongs to it alone. Durable."""
    _set_copied(file, header, _Shared())
    file.flush()


def set_copied(file: Node, header: Header) -> None:
    """Entries of the active tables have the flag where the stored counts are one. Durable."""
    entries = header.refcount_table_clusters << (header.cluster_bits - 3)
    table = read_words(file, header.refcount_table_offset, entries)
    stored = StoredCounts(file, header, table & np.uint64(REFTABLE_OFFSET_MASK))
    clusters = -(-file.size // header.cluster_size) + 1
    for first in range(0, clusters, WINDOW):
        end = min(first + WINDOW, clusters)
        _set_copied(file, header, WindowCounts(stored, first, end, clusters))
    file.flush()


def _set_copied(file: Node, header: Header, counts: Lookup) -> None:
    check_copied(file, header, counts, None, fixes=True)
