"""What L2 entries mean: from guest addresses to runs of clusters, read only.

``Standard`` understands entries of one word; ``subclusters.Extended`` those of two words, whose
clusters consist of subclusters.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence

from lamina.block.extents import Kind
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.block.node import WriteRequest
    from lamina.errors import LaminaError
    from lamina.formats.qcow2.mapping import Qcow2Mapping

_unpack_entry = struct.Struct(">Q").unpack_from

WRITABLE = COPIED | COMPRESSED | ZERO_FLAG
"""An entry may be written in place if of these bits it has COPIED alone."""


class Run(NamedTuple):
    """Guest bytes of one fate. Figures in bytes."""

    guest_offset: int
    length: int
    kind: Kind
    host_offset: int
    """-1: none."""
    entry: int
    """The L2 entry, of a compressed cluster."""


class Reading(ABC):
    def __init__(self, mapping: Qcow2Mapping) -> None:
        self.mapping = mapping
        self.tables = mapping.tables
        self.space = mapping.space
        self.cluster_bits = mapping.cluster_bits
        self.low = mapping.header.cluster_size - 1

    @abstractmethod
    def locate(
        self, requests: Sequence[WriteRequest], *, writing: bool
    ) -> list[int] | None:
        """Host offsets of requests that lie in plain data of one cluster each, which for
        ``writing`` belongs to nobody else; -1 for others and where the table is not cached."""

    @abstractmethod
    def runs(self, first: int, count: int) -> Iterator[Run]:
        """Runs of whole guest clusters. Neighbours may be of one kind all the same.

        Raises ImageCorrupt.
        """

    @abstractmethod
    def check(self, cluster: int, words: array[int], at: int) -> None:
        """Raises ImageCorrupt for an entry (at this place of ``words``) that breaks the rules."""

    def check_compressed(self, cluster: int) -> None:
        """Raises ImageCorrupt if this cluster cannot be a compressed one."""
        if self.space.external:
            raise self.bad_entry(
                "Compressed cluster entry found in image with external data file", cluster
            )

    def check_place(self, cluster: int, host: int) -> None:
        if host & self.low:
            raise self.bad_entry(f"Cluster allocation offset {c_hex(host)} unaligned", cluster)
        self.space.check_entry(cluster, host)

    def bad_entry(self, message: str, cluster: int) -> LaminaError:
        tables = self.tables
        table = tables.table_offset(cluster >> tables.l2_bits)
        index = cluster & (tables.l2_entries - 1)
        return self.mapping.corruption.found(
            f"{message} (L2 offset: {c_hex(table)}, L2 index: {c_hex(index)})",
            structure="L2 table",
            offset=table + index * tables.entry_size,
        )


class Standard(Reading):
    """Entries of one word ("Standard Cluster Descriptor")."""

    def locate(
        self, requests: Sequence[WriteRequest], *, writing: bool
    ) -> list[int] | None:
        if self.space.external:
            return self._locate_external(requests)
        tables = self.tables
        l1, cached = tables.l1, tables.cache.find
        bits, l2_bits, slices, within_slice = tables.geometry
        low = self.low
        unit = low + 1
        mask, wanted = (WRITABLE | low, COPIED) if writing else (COMPRESSED | ZERO_FLAG | low, 0)
        places = []
        try:
            for offset, buffer in requests:
                place = -1
                cluster = offset >> bits
                # Without an L2 table this is an offset in the header's cluster: never cached.
                table = cached((l1[cluster >> l2_bits] & OFFSET_MASK) + ((cluster & slices) << 3))
                if table is not None:
                    (entry,) = _unpack_entry(table, (cluster & within_slice) << 3)
                    host = entry & OFFSET_MASK
                    within = offset & low
                    if host and entry & mask == wanted and within + len(buffer) <= unit:
                        place = host + within
                places.append(place)
        except IndexError:  # VM state behind the end of the L1 table
            return None
        return places

    def _locate_external(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        """In a data file everything lies where its address says, if it lies there at all."""
        tables = self.tables
        l1, cached = tables.l1, tables.cache.find
        bits, l2_bits, slices, within_slice = tables.geometry
        low = self.low
        places = []
        try:
            for offset, buffer in requests:
                place = -1
                cluster = offset >> bits
                table = cached((l1[cluster >> l2_bits] & OFFSET_MASK) + ((cluster & slices) << 3))
                if table is not None:
                    (entry,) = _unpack_entry(table, (cluster & within_slice) << 3)
                    within = offset & low
                    if entry == COPIED | offset - within and within + len(buffer) <= low + 1:
                        place = offset
                places.append(place)
        except IndexError:
            return None
        return places

    def runs(self, first: int, count: int) -> Iterator[Run]:
        bits = self.cluster_bits
        unit = self.low + 1
        for start, part, entries in self.tables.walk(first, count):
            if entries is None:
                yield Run(start << bits, part << bits, Kind.BELOW, -1, 0)
                continue
            cluster = run = start
            kind, host, opening = Kind.BELOW, -1, 0
            # The entry that would carry the run on, and what it grows by from cluster to cluster.
            expected = entries[0] ^ 1
            step = 0
            for entry in entries:
                if entry == expected:
                    expected += step
                    cluster += 1
                    continue
                if cluster > run:
                    yield Run(run << bits, (cluster - run) << bits, kind, host, opening)
                run, opening = cluster, entry
                kind, host = self.classify(cluster, entry)
                cluster += 1
                if kind is Kind.ENCODED:
                    yield Run(run << bits, unit, kind, host, entry)
                    run = cluster
                    expected = -1
                else:
                    step = unit if host >= 0 else 0
                    expected = entry + step
            if cluster > run:
                yield Run(run << bits, (cluster - run) << bits, kind, host, opening)

    def classify(self, cluster: int, entry: int) -> tuple[Kind, int]:
        """Kind and host offset (-1: none) of an L2 entry."""
        if entry & COMPRESSED:
            self.check_compressed(cluster)
            return Kind.ENCODED, -1
        host = entry & OFFSET_MASK
        if entry & ZERO_FLAG:
            if self.mapping.header.version < 3:
                raise self.bad_entry("Zero cluster entry found in pre-v3 image", cluster)
            if not host:
                return Kind.ZERO, -1
            self.check_place(cluster, host)
            return Kind.ZERO, host
        host = self.space.place(entry)
        if host < 0:
            return Kind.BELOW, -1
        self.check_place(cluster, host)
        return Kind.DATA, host

    def check(self, cluster: int, words: array[int], at: int) -> None:
        self.classify(cluster, words[at])
