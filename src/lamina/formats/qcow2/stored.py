"""The refcounts that an image keeps, as arrays, and how they are changed in place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lamina.formats.qcow2.arrays import (
    BATCH,
    Counts,
    Indices,
    Mask,
    Words,
    count_type,
    pack_counts,
    read_into,
    unpack_counts,
)
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header


class CountRun(NamedTuple):
    """The counts of neighbouring clusters; None: there are no blocks, so all of them are zero."""

    first: int
    end: int
    counts: Counts | None


class StoredCounts:
    """The refcount blocks that a refcount table names."""

    def __init__(self, file: Node, header: Header, table: Words) -> None:
        """``table``: host offsets of usable blocks, 0 where there is none."""
        self.file = file
        self.order = header.refcount_order
        self.block_bytes = header.cluster_size
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        self.table = table

    def runs(self, first: int, end: int) -> Iterator[CountRun]:
        """The counts of the clusters ``first`` to ``end``, both at the border of a block or at
        the end of the file, in order and without gaps."""
        low = first // self.per_block
        high = min(-(-end // self.per_block), len(self.table))
        present = np.flatnonzero(self.table[low:high]) + low
        step = max(BATCH // self.block_bytes, 1)
        position = first
        for group in _neighbours(present, step):
            start = int(group[0]) * self.per_block
            if position < start:
                yield CountRun(position, start, None)
            position = min(start + len(group) * self.per_block, end)
            yield CountRun(start, position, self._read(group)[: position - start])
        if position < end:
            yield CountRun(position, end, None)

    def _read(self, blocks: Indices) -> Counts:
        buffer = memoryview(bytearray(len(blocks) * self.block_bytes))
        read_into(
            self.file,
            [
                (int(self.table[block]), buffer[at : at + self.block_bytes])
                for at, block in zip(
                    range(0, len(buffer), self.block_bytes), blocks.tolist(), strict=True
                )
            ],
        )
        return unpack_counts(buffer, self.order)

    def window(self, first: int, end: int) -> Counts:
        """All counts of these clusters in one array."""
        result = np.zeros(end - first, dtype=count_type(self.order))
        for run in self.runs(first, end):
            if run.counts is not None:
                result[run.first - first : run.end - first] = run.counts
        return result

    def get(self, clusters: Indices) -> Counts:
        """Counts of single clusters, which may lie behind everything that has blocks."""
        result = np.zeros(len(clusters), dtype=count_type(self.order))
        blocks = clusters // self.per_block
        for block in np.unique(blocks).tolist():
            if block < len(self.table) and self.table[block]:
                here = blocks == block
                counts = self._read(np.array([block]))
                result[here] = counts[clusters[here] % self.per_block]
        return result

    def put(self, clusters: Indices, values: Counts) -> None:
        """Change single counts. Every cluster has a block; clusters ascend."""
        blocks = clusters // self.per_block
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        for low, high in zip(starts.tolist(), [*starts[1:].tolist(), len(blocks)], strict=True):
            block = int(blocks[low])
            counts = self._read(np.array([block]))
            counts[clusters[low:high] % self.per_block] = values[low:high]
            self._write(block, counts)

    def clear_from(self, cluster: int) -> bool:
        """Set the counts of this cluster and all behind it to zero; whether any was not."""
        first = cluster // self.per_block
        changed = False
        for block in (np.flatnonzero(self.table[first:]) + first).tolist():
            counts = self._read(np.array([block]))
            behind = counts[max(cluster - block * self.per_block, 0) :]
            if behind.any():
                behind[:] = 0
                self._write(block, counts)
                changed = True
        return changed

    def _write(self, block: int, counts: Counts) -> None:
        place = int(self.table[block])
        data = pack_counts(counts, self.order)
        self.file.write(place, data[: max(self.file.size - place, 0)])


class WindowCounts:
    """Refcounts of one window of clusters, and in the first one of those behind all windows."""

    def __init__(self, stored: StoredCounts, first: int, end: int, file_clusters: int) -> None:
        self.first = first
        self.counts = stored.window(first, end)
        self._stored = stored
        self._file_clusters = file_clusters

    def change(self, clusters: Indices, counts: Counts) -> None:
        inside = (clusters >= self.first) & (clusters < self.first + len(self.counts))
        self.counts[clusters[inside] - self.first] = counts[inside]

    def look_up(self, clusters: Indices) -> tuple[Counts, Mask | None]:
        """(their counts, which of them are known here; None: all)."""
        index = clusters - self.first if self.first else clusters
        if not len(index) or (int(index.max()) < len(self.counts) and int(index.min()) >= 0):
            return self.counts[index], None
        inside = (index >= 0) & (index < len(self.counts))
        counts = np.zeros(len(clusters), dtype=self.counts.dtype)
        counts[inside] = self.counts[index[inside]]
        if self.first == 0:
            behind = clusters >= self._file_clusters
            counts[behind] = self._stored.get(clusters[behind])
            inside |= behind
        return counts, inside


def _neighbours(blocks: Indices, most: int) -> Iterator[Indices]:
    """Runs of consecutive numbers, no longer than ``most``."""
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
        for start in range(0, len(run), most):
            yield run[start : start + most]
