"""Counting references to clusters, a window of the file at a time."""

from __future__ import annotations

import numpy as np

from lamina.formats.qcow2.arrays import Counts, Indices
from lamina.hints import Any

WINDOW = 1 << 26
"""Clusters that are counted in one pass over the tables: 128 MiB of 16-bit counts."""


class Census:
    """Reference counts of the clusters from ``first`` on."""

    def __init__(self, first: int, count: int, dtype: type[np.unsignedinteger[Any]]) -> None:
        self.first = first
        self.counts: Counts = np.zeros(count, dtype=dtype)
        self.windows: set[int] = set()
        """Other windows, in which clusters lie that were to be counted."""
        self._total = 0
        self._most = int(np.iinfo(dtype).max)

    def add(self, clusters: Indices, weight: int = 1) -> None:
        """Count each of these clusters ``weight`` more times; those elsewhere are ignored."""
        if not len(clusters):
            return
        low, high = int(clusters.min()) - self.first, int(clusters.max()) - self.first
        if low < 0 or high >= len(self.counts):
            inside = (clusters >= self.first) & (clusters < self.first + len(self.counts))
            self.windows.update((np.unique(clusters[~inside]) // WINDOW).tolist())
            clusters = clusters[inside]
        step = self._step(weight, len(clusters))
        if high - low == len(clusters) - 1 and (np.diff(clusters) == 1).all():
            self.counts[low : high + 1] += step
        else:
            np.add.at(self.counts, clusters - self.first if self.first else clusters, step)

    def add_run(self, first: int, count: int, weight: int = 1) -> None:
        low = max(first - self.first, 0)
        high = min(first + count - self.first, len(self.counts))
        if high - low < count:
            self.windows.update(range(first // WINDOW, (first + count - 1) // WINDOW + 1))
        if low < high:
            self.counts[low:high] += self._step(weight, high - low)

    def _step(self, weight: int, clusters: int) -> np.unsignedinteger[Any]:
        self._total += weight * clusters
        step: np.unsignedinteger[Any] = self.counts.dtype.type(min(weight, self._most))
        return step

    def get(self, cluster: int) -> int:
        """The count so far; 0 for clusters elsewhere."""
        index = cluster - self.first
        return int(self.counts[index]) if 0 <= index < len(self.counts) else 0

    def is_exact(self) -> bool:
        """No counter went past its end: the sum tells."""
        return int(self.counts.sum(dtype=np.uint64)) == self._total


def count_uses(offsets: Indices) -> tuple[Indices, Indices]:
    """(indices at which an offset occurs for the first time, how often each occurs, counted there
    and 0 elsewhere)."""
    if len(offsets) < 2 or (np.diff(offsets) > 0).all():
        return np.arange(len(offsets)), np.ones(len(offsets), dtype=np.int64)
    _, first, count = np.unique(offsets, return_index=True, return_counts=True)
    weights = np.zeros(len(offsets), dtype=np.int64)
    weights[first] = count
    return np.sort(first), weights
