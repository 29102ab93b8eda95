"""Extended L2 entries: clusters that consist of 32 subclusters ("Extended L2 Entries").

An entry has a second word with two bits for every subcluster: it is allocated, or it reads as
zeroes. A subcluster with neither bit comes from the backing file, whether or not the cluster has a
place. Subclusters are what is copied on write and zeroed; clusters are what is allocated.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache

from lamina.block.extents import Kind
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from lamina.formats.qcow2.reading import Reading, Run
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import WriteRequest
    from lamina.formats.qcow2.mapping import Qcow2Mapping

SUBCLUSTERS = 32
"""Of a cluster."""
SUBCLUSTER_BITS = 5
ALL = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL << SUBCLUSTERS

_unpack_entry = struct.Struct(">QQ").unpack_from


def bits_of(first: int, last: int) -> int:
    """The bits of the subclusters from ``first`` to ``last``."""
    return (2 << last) - (1 << first)


def is_contradictory(entry: int, bitmap: int) -> bool:
    """A subcluster is both allocated and zero, or is allocated in a cluster without a place.

    ``entry`` is 0 if the cluster has none.
    """
    return bool(bitmap & bitmap >> SUBCLUSTERS or (not entry and bitmap & ALL))


@lru_cache(maxsize=4096)
def parts(bitmap: int) -> tuple[tuple[int, int, Kind], ...]:
    """(first subcluster, how many, DATA, ZERO or BELOW) of the runs of subclusters."""
    found: list[tuple[int, int, Kind]] = []
    for number in range(SUBCLUSTERS):
        if bitmap >> number & 1:
            kind = Kind.DATA
        elif bitmap >> (SUBCLUSTERS + number) & 1:
            kind = Kind.ZERO
        else:
            kind = Kind.BELOW
        if found and found[-1][2] is kind:
            first, count, _ = found[-1]
            found[-1] = first, count + 1, kind
        else:
            found.append((number, 1, kind))
    return tuple(found)


class Extended(Reading):
    """Entries of two words."""

    def __init__(self, mapping: Qcow2Mapping) -> None:
        super().__init__(mapping)
        self.bits = self.cluster_bits - SUBCLUSTER_BITS
        """Of an offset in a subcluster."""

    def locate(
        self, requests: Sequence[WriteRequest], *, writing: bool
    ) -> list[int] | None:
        tables = self.tables
        l1, cached = tables.l1, tables.cache.find
        bits, l2_bits, slices, within_slice = tables.geometry
        sub, low, external = self.bits, self.low, self.space.external
        mask = COMPRESSED | low
        wanted = 0
        if writing or external:
            mask |= COPIED
            wanted = COPIED
        places = []
        try:
            for offset, buffer in requests:
                place = -1
                cluster = offset >> bits
                table = cached((l1[cluster >> l2_bits] & OFFSET_MASK) + ((cluster & slices) << 4))
                within = offset & low
                end = within + len(buffer)
                if table is not None and within < end <= low + 1:
                    entry, bitmap = _unpack_entry(table, (cluster & within_slice) << 4)
                    host = entry & OFFSET_MASK
                    usable = host == offset - within if external else host
                    touched = (2 << (end - 1 >> sub)) - (1 << (within >> sub))
                    if (
                        usable
                        and entry & mask == wanted
                        and bitmap & touched == touched
                        and not bitmap & bitmap >> 32
                    ):
                        place = host + within
                places.append(place)
        except IndexError:  # VM state behind the end of the L1 table
            return None
        return places

    def runs(self, first: int, count: int) -> Iterator[Run]:
        bits, sub, unit = self.cluster_bits, self.bits, self.low + 1
        for start, part, words in self.tables.walk(first, count):
            guest = start << bits
            if words is None:
                yield Run(guest, part << bits, Kind.BELOW, -1, 0)
                continue
            pending = Run(guest, 0, Kind.DATA, -1, 0)
            for at in range(0, 2 * part, 2):
                entry, bitmap = words[at], words[at + 1]
                length = pending.length
                if bitmap == ALL and length and entry == COPIED | pending.host_offset + length:
                    # Filled in order: what most clusters of most images are.
                    pending = pending._replace(length=length + unit)
                    guest += unit
                    continue
                if length:
                    yield pending
                pending = Run(guest, 0, Kind.DATA, -1, 0)
                self.check(guest >> bits, words, at)
                if entry & COMPRESSED:
                    yield Run(guest, unit, Kind.ENCODED, -1, entry)
                    guest += unit
                    continue
                host = self.space.place(entry)
                if bitmap == ALL:
                    pending = Run(guest, unit, Kind.DATA, host, entry)
                    guest += unit
                    continue
                for number, subclusters, kind in parts(bitmap):
                    skip = number << sub
                    place = host + skip if host >= 0 else -1
                    yield Run(guest + skip, subclusters << sub, kind, place, entry)
                guest += unit
            if pending.length:
                yield pending

    def check(self, cluster: int, words: array[int], at: int) -> None:
        entry, bitmap = words[at], words[at + 1]
        if entry & COMPRESSED:
            self.check_compressed(cluster)
            return
        host = self.space.place(entry)
        if is_contradictory(host + 1, bitmap):
            raise self.bad_entry("Invalid cluster entry found ", cluster)
        if host >= 0:
            self.check_place(cluster, host)
