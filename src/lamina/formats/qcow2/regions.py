"""Where the tables of an image lie that its L2 tables may not be mistaken for."""

from __future__ import annotations

import numpy as np

from lamina.formats.qcow2.arrays import Indices, Mask, read_words
from lamina.formats.qcow2.layout import (
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    Header,
)
from lamina.formats.qcow2.snapshot_layout import Snapshot, snapshot_table_length
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node


class Regions:
    """Runs of clusters that are known to serve a purpose."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []
        self._vital: list[tuple[int, int, str]] = []
        self._sorted: tuple[Indices, Indices] | None = None

    def add(self, first: int, end: int, vital: str = "") -> None:
        """``vital``: the name of what an image cannot do without and nobody can derive again."""
        if first < end:
            self._spans.append((first, end))
            self._sorted = None
            if vital:
                self._vital.append((first, end, vital))

    def contain(self, clusters: Indices) -> Mask:
        """Which of these clusters lie in one of the regions."""
        if not self._spans:
            return np.zeros(len(clusters), dtype=np.bool_)
        if self._sorted is None:
            spans = np.array(sorted(self._spans), dtype=np.int64)
            # The furthest end of this region and all before it: regions may overlap.
            self._sorted = spans[:, 0].copy(), np.maximum.accumulate(spans[:, 1])
        starts, ends = self._sorted
        index = np.searchsorted(starts, clusters, side="right") - 1
        inside: Mask = (index >= 0) & (clusters < ends[index])
        return inside

    def vital(self, cluster: int) -> str:
        """The name of the vital table in this cluster; empty if there is none."""
        for first, end, name in self._vital:
            if first <= cluster < end:
                return name
        return ""


def is_l1_usable(file: Node, header: Header, snapshots: list[Snapshot]) -> bool:
    """Whether the active L1 table lies in the file, and not on what it cannot share."""
    file_size = file.size
    offset, length = header.l1_table_offset, header.l1_size * 8
    if not length:
        return True
    if offset == 0 or offset + length - file_size >= header.cluster_size:
        return False
    bits = header.cluster_bits
    regions = Regions()
    first = header.refcount_table_offset >> bits
    regions.add(first, first + header.refcount_table_clusters)
    for place in block_places(file, header):
        regions.add(place >> bits, (place >> bits) + 1)
    if snapshots:
        end = header.snapshots_offset + snapshot_table_length(snapshots)
        regions.add(header.snapshots_offset >> bits, (end - 1 >> bits) + 1)
    clusters = np.arange(offset >> bits, ((offset + length - 1) >> bits) + 1)
    if not regions.contain(clusters).any():
        return True
    # One of the header's fields is wrong. If this looks like an L1 table, it is the other one.
    entries = read_words(file, offset, header.l1_size)
    entries = entries[entries != 0]
    places = entries & np.uint64(OFFSET_MASK)
    plausible = (entries & np.uint64(L1_RESERVED)) == 0
    plausible &= (places & np.uint64(header.cluster_size - 1)) == 0
    plausible &= (places != 0) & (places < np.uint64(file_size))
    if not snapshots:
        plausible &= (entries & np.uint64(COPIED)) != 0
    return bool(plausible.all())


def protected_regions(file: Node, header: Header, snapshots: list[Snapshot]) -> Regions:
    """Tables of other kinds: what looks like an L2 table there is not to be mended."""
    bits, cluster_size = header.cluster_bits, header.cluster_size
    regions = Regions()

    def add(offset: int, length: int, vital: str = "") -> None:
        regions.add(offset >> bits, (offset + length + cluster_size - 1) >> bits, vital)

    add(0, cluster_size, "the header")
    add(header.l1_table_offset, header.l1_size * 8, "the active L1 table")
    length = header.refcount_table_clusters << bits
    add(header.refcount_table_offset, length)
    for place in block_places(file, header):
        add(place, cluster_size)
    add(header.snapshots_offset, snapshot_table_length(snapshots))
    for snapshot in snapshots:
        add(snapshot.l1_table_offset, snapshot.l1_size * 8)
    return regions


def block_places(file: Node, header: Header) -> list[int]:
    """Host offsets of all refcount blocks that lie in the file."""
    entries = header.refcount_table_clusters << (header.cluster_bits - 3)
    table = read_words(file, header.refcount_table_offset, entries)
    table &= np.uint64(REFTABLE_OFFSET_MASK)
    usable = (table != 0) & (table < np.uint64(file.size))
    usable &= (table & np.uint64(header.cluster_size - 1)) == 0
    places: list[int] = table[usable].tolist()
    return places
