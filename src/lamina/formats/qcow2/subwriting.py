"""Places for writes where clusters consist of subclusters.

A cluster that is ours takes the write where it is; only of the subclusters that hold no data yet
the edges are copied. A new cluster takes along what the old one holds, from its first subcluster
with data to its last, and leaves the others as they were.
"""

from __future__ import annotations

from array import array

from lamina.block.extents import Kind
from lamina.engine.mapping import Piece
from lamina.formats.qcow2.layout import COMPRESSED
from lamina.formats.qcow2.subclusters import (
    ALL,
    SUBCLUSTER_BITS,
    SUBCLUSTERS,
    bits_of,
    is_contradictory,
    parts,
)
from lamina.formats.qcow2.writing import Planner, Run


class ExtendedPlanner(Planner):
    def plan_entries(self, cluster: int, entries: array[int]) -> None:
        homeless: list[tuple[int, int]] = []
        """Entries of neighbours that need a new place."""
        for at in range(0, len(entries), 2):
            entry, bitmap = entries[at], entries[at + 1]
            host = self.our_place(cluster, entry)
            self._check(cluster, entry, bitmap)
            if host < 0:
                homeless.append((entry, bitmap))
            else:
                if homeless:
                    self._allocate(cluster - len(homeless), homeless)
                    homeless = []
                self._write_in_place(cluster, host, bitmap)
            cluster += 1
        if homeless:
            self._allocate(cluster - len(homeless), homeless)

    def _check(self, cluster: int, entry: int, bitmap: int) -> None:
        if not entry & COMPRESSED and is_contradictory(
            self.mapping.space.place(entry) + 1, bitmap
        ):
            raise self.mapping.reading.bad_entry("Invalid cluster entry found", cluster)

    def _span(self, cluster: int) -> tuple[int, int, int, int]:
        """What the range has of a cluster: (guest offset, its end, first and last subcluster)."""
        base = cluster << self.bits
        start, end = max(base, self.start), min(base + self.unit, self.end)
        sub = self.bits - SUBCLUSTER_BITS
        return start, end, (start - base) >> sub, (end - 1 - base) >> sub

    # -- in a place that is ours -----------------------------------------------------------------

    def _write_in_place(self, cluster: int, host: int, bitmap: int) -> None:
        start, end, first, last = self._span(cluster)
        base = cluster << self.bits
        touched = bits_of(first, last)
        if bitmap & touched == touched:
            self.mapping.space.check(host, 1)
            self._add_piece(start, end, host + start - base)
            return
        after = (bitmap | touched) & ~(touched << SUBCLUSTERS)
        self.write.add_run(Run(cluster, 1, host, is_new=False, bitmaps=array("Q", [after])))
        sub = self.bits - SUBCLUSTER_BITS
        for number, count, kind in parts(bitmap):
            low = base + (number << sub)
            high = low + (count << sub)
            piece_start, piece_end = max(low, start), min(high, end)
            if piece_start >= piece_end:
                continue
            place = host + piece_start - base
            if kind is Kind.DATA:
                self._add_piece(piece_start, piece_end, place)
                continue
            # Whole subclusters become data: those at the edges with what they held so far.
            head = piece_start - (base + ((piece_start - base) >> sub << sub))
            tail = -(piece_end - base) % (1 << sub)
            self._add_piece(piece_start, piece_end, place, (head, tail))

    def _add_piece(
        self,
        start: int,
        end: int,
        host: int,
        copies: tuple[int, int] | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        """``copies``: bytes of the head and the tail; None: over data that is there already."""
        head, tail = copies or (0, 0)
        fresh = copies is not None
        node = self.mapping.data_node
        piece = Piece(start, end - start, node, host, head, tail, fresh=fresh)
        self.write.add_piece(piece, is_new=is_new)

    # -- in a new place --------------------------------------------------------------------------

    def _allocate(self, cluster: int, old: list[tuple[int, int]]) -> None:
        plans = [
            self._plan_new(cluster + number, *entry) for number, entry in enumerate(old)
        ]
        for first, count, host in self.write.allocate(cluster, len(old)):
            some = plans[first - cluster : first - cluster + count]
            bitmaps = array("Q", [plan[0] for plan in some])
            self.write.add_run(Run(first, count, host, is_new=True, bitmaps=bitmaps))
            for number, (_, low, high) in enumerate(some):
                start, end, _, _ = self._span(first + number)
                base = (first + number) << self.bits
                place = host + (number << self.bits) + start - base
                copies = start - base - low, high - (end - base)
                self._add_piece(start, end, place, copies, is_new=True)

    def _plan_new(self, cluster: int, entry: int, bitmap: int) -> tuple[int, int, int]:
        """(bitmap of the new cluster, offsets in it between which it holds data)."""
        _, _, first, last = self._span(cluster)
        if entry & COMPRESSED:
            return ALL, 0, self.unit
        held = bitmap & ALL
        if held:
            first = min(first, (held & -held).bit_length() - 1)
            last = max(last, held.bit_length() - 1)
        filled = bits_of(first, last)
        sub = self.bits - SUBCLUSTER_BITS
        return (bitmap | filled) & ~(filled << SUBCLUSTERS), first << sub, (last + 1) << sub
