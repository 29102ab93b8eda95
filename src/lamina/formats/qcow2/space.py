"""Where data clusters lie: counted in the image file itself, or uncounted in a data file.

In an external data file ("External data file name string") every guest cluster has the place that
its guest address says. There is nothing to search and nothing to count: taking a cluster means to
name it, giving it back means that nobody needs what the data file has there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from lamina.errors import LaminaError
from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, compressed_extent
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.mapping import Qcow2Mapping


class Space(ABC):
    """Offsets are host bytes in ``node``, counts are clusters."""

    node: Node
    external: bool

    def __init__(self, mapping: Qcow2Mapping, node: Node) -> None:
        self._mapping = mapping
        self.node = node
        self._unneeded = ClusterSet()
        """Places whose content is to be discarded once it is durable that nothing needs it. A write
        there takes them out again."""

    def empty_later(self, host_offsets: Sequence[int]) -> None:
        """Clusters that keep their places, for zeroes, need not keep what is there."""
        bits = self._mapping.cluster_bits
        clusters = ClusterSet()
        for offset in host_offsets:
            clusters.add(offset >> bits, (offset >> bits) + 1)
        runs = clusters.runs()
        for first, end in runs:
            self._unneeded.add(first, end)
        self._mapping.metadata.when_durable(lambda: self._empty(runs))

    def _empty(self, runs: Sequence[tuple[int, int]]) -> None:
        bits = self._mapping.cluster_bits
        for run in runs:
            for first, end in self._unneeded.remove(*run):
                self.discard(first << bits, (end - first) << bits)

    def needed(self, host_offset: int, count: int) -> None:
        """Data is about to be written to clusters that were kept for zeroes."""
        first = host_offset >> self._mapping.cluster_bits
        self._unneeded.remove(first, first + count)

    @abstractmethod
    def place(self, entry: int) -> int:
        """Host offset that an L2 entry, not of a compressed cluster, names; -1: none."""

    @abstractmethod
    def allocate(self, cluster: int, count: int, goal: int = 0) -> tuple[int, int]:
        """(host offset, clusters) of places in a row for guest clusters; maybe for fewer of them.

        ``goal``: where they are wanted, if it is free there.
        """

    @abstractmethod
    def cancel(self, host_offset: int, count: int) -> None:
        """Give back what ``allocate`` found and nothing ever named. Never raises."""

    @abstractmethod
    def free_later(self, freed: Sequence[Freed]) -> None:
        """Give clusters back once no table on disk names them and nobody reads them."""

    @abstractmethod
    def check(self, host_offset: int, count: int) -> None:
        """Raises ImageCorrupt if guest data must not be written there."""

    @abstractmethod
    def check_entry(self, cluster: int, host_offset: int) -> None:
        """Raises ImageCorrupt if this guest cluster cannot lie there."""

    @abstractmethod
    def discard(self, host_offset: int, length: int) -> None:
        """These bytes need not be kept. A hint: its failure changes nothing."""

    def references(self, entry: int, cluster_bits: int, cause: Cause) -> list[Freed]:
        """The host clusters that an L2 entry refers to."""
        if entry & COMPRESSED:
            offset, length = compressed_extent(entry, cluster_bits)
            first = offset >> cluster_bits
            last = (offset + length - 1) >> cluster_bits
            return [Freed(first, last - first + 1, cause)]
        offset = self.place(entry)
        return [Freed(offset >> cluster_bits, 1, cause)] if offset >= 0 else []


class ImageSpace(Space):
    external = False

    def __init__(self, mapping: Qcow2Mapping) -> None:
        super().__init__(mapping, mapping.file)

    def place(self, entry: int) -> int:
        return entry & OFFSET_MASK or -1

    def allocate(self, cluster: int, count: int, goal: int = 0) -> tuple[int, int]:
        allocator = self._mapping.allocator
        if goal and (found := allocator.allocate_at(goal, count)):
            return goal, found
        return allocator.allocate(count), count

    def cancel(self, host_offset: int, count: int) -> None:
        self._mapping.allocator.cancel(host_offset, count)

    def free_later(self, freed: Sequence[Freed]) -> None:
        self._mapping.allocator.free_later(freed)

    def check(self, host_offset: int, count: int) -> None:
        self._mapping.overlap.check(host_offset, count << self._mapping.cluster_bits)

    def check_entry(self, cluster: int, host_offset: int) -> None:
        pass

    def discard(self, host_offset: int, length: int) -> None:
        self._mapping.allocator.discard_below(host_offset, length)


class DataFileSpace(Space):
    external = True

    def place(self, entry: int) -> int:
        # A cluster at offset 0 is told from none by COPIED alone.
        return entry & OFFSET_MASK if entry & (COPIED | OFFSET_MASK) else -1

    def allocate(self, cluster: int, count: int, goal: int = 0) -> tuple[int, int]:
        # It may have been given up a moment ago.
        self._unneeded.remove(cluster, cluster + count)
        return cluster << self._mapping.cluster_bits, count

    def cancel(self, host_offset: int, count: int) -> None:
        pass

    def free_later(self, freed: Sequence[Freed]) -> None:
        mapping = self._mapping
        passed = [run for run in freed if run.cause in mapping.allocator.pass_discard]
        if passed:
            runs = [(first, first + clusters) for first, clusters, _ in passed]
            for first, end in runs:
                self._unneeded.add(first, end)
            mapping.metadata.when_durable(lambda: self._empty(runs))

    def check(self, host_offset: int, count: int) -> None:
        pass

    def check_entry(self, cluster: int, host_offset: int) -> None:
        guest_offset = cluster << self._mapping.cluster_bits
        if host_offset != guest_offset:
            index = cluster & (self._mapping.header.l2_entries - 1)
            raise self._mapping.corruption.found(
                f"External data file host cluster offset {c_hex(host_offset)} does not match guest "
                f"cluster offset: {c_hex(guest_offset)}, L2 index: {c_hex(index)})",
                structure="L2 table",
            )

    def discard(self, host_offset: int, length: int) -> None:
        length = min(length, self.node.size - host_offset)
        if length > 0:
            try:
                self.node.discard(host_offset, length)
            except LaminaError:
                return


class ClusterSet:
    """A set of clusters, kept as runs that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def runs(self) -> list[tuple[int, int]]:
        """(first, end) of all."""
        return list(zip(self._starts, self._ends, strict=True))

    def add(self, first: int, end: int) -> None:
        low = bisect_left(self._ends, first)
        high = bisect_right(self._starts, end)
        if low < high:
            first = min(first, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [first]
        self._ends[low:high] = [end]

    def remove(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first, end) of the runs that were in the set."""
        low = bisect_right(self._ends, first)
        high = bisect_left(self._starts, end)
        if low >= high:
            return []
        runs = list(zip(self._starts[low:high], self._ends[low:high], strict=True))
        left = [(start, min(stop, first)) for start, stop in runs if start < first]
        left += [(max(start, end), stop) for start, stop in runs if stop > end]
        self._starts[low:high] = [start for start, _ in left]
        self._ends[low:high] = [stop for _, stop in left]
        return [(max(start, first), min(stop, end)) for start, stop in runs]
