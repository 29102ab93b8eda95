"""Places for writes: in place where a cluster is ours alone, else in new clusters.

Nothing is published before ``commit``: until then the L2 tables name the old clusters, and nobody
but the reservation knows of the new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence

from lamina.engine.mapping import InPlace, Piece, Reservation
from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, ZERO_FLAG, compressed_entry
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.formats.qcow2.encryption import Encryption
    from lamina.formats.qcow2.mapping import Qcow2Mapping


class Run(NamedTuple):
    """Guest clusters that one write turns into data clusters, one behind the other."""

    cluster: int
    clusters: int
    host_offset: int
    is_new: bool
    """Allocated for this write; otherwise clusters with a place become data there."""
    bitmaps: array[int] | None = None
    """With extended L2 entries: the second word of each entry."""

    def without(self, clusters: int, cluster_bits: int) -> Run:
        """What is left behind the first ``clusters``."""
        return Run(
            self.cluster + clusters,
            self.clusters - clusters,
            self.host_offset + (clusters << cluster_bits),
            self.is_new,
            None if self.bitmaps is None else self.bitmaps[clusters:],
        )

    def entries(self, clusters: int, cluster_bits: int) -> array[int]:
        """Those of the first ``clusters``."""
        bitmaps = None if self.bitmaps is None else self.bitmaps[:clusters]
        return entry_run(self.host_offset, clusters, 1 << cluster_bits, bitmaps)


def entry_run(
    host_offset: int, clusters: int, cluster_size: int, bitmaps: array[int] | None = None
) -> array[int]:
    """L2 entries of data clusters that lie one behind the other and belong to nobody else."""
    first = host_offset | COPIED
    words = array("Q", range(first, first + clusters * cluster_size, cluster_size))
    if bitmaps is None:
        return words
    pairs = array("Q", bytes(16 * clusters))
    pairs[::2], pairs[1::2] = words, bitmaps
    return pairs


class Write(Reservation):
    """Runs that wait to be named by the L2 tables."""

    def __init__(self, mapping: Qcow2Mapping) -> None:
        self.mapping = mapping
        self.pieces: list[Piece] = []
        self.runs: list[Run] = []

    def commit(self) -> None:
        mapping = self.mapping
        bits, tables = mapping.cluster_bits, mapping.tables
        freed: list[Freed] = []
        try:
            mapping.corruption.check()
            for number, run in enumerate(self.runs):
                for cluster, part, entries in tables.walk(run.cluster, run.clusters):
                    # Only loading a table can fail, and this part of it is loaded.
                    left = self.runs[number]
                    tables.store(cluster, left.entries(part, bits))
                    if run.is_new and entries is not None:
                        freed += self._replaced(entries)
                    self.runs[number] = left.without(part, bits)
        except BaseException:
            self.abort()
            raise
        finally:
            if freed:
                mapping.allocator.free_later(freed)

    def _replaced(self, entries: array[int]) -> Iterator[Freed]:
        """What the old entries referred to; in a data file, nothing else than the new ones do."""
        mapping = self.mapping
        space, bits = mapping.space, mapping.cluster_bits
        if space.external:
            return
        for entry in entries[:: mapping.tables.entry_words]:
            if entry:
                yield from space.references(entry, bits, Cause.OTHER)

    def abort(self) -> None:
        for run in self.runs:
            if run.is_new and run.clusters:
                self.mapping.space.cancel(run.host_offset, run.clusters)

    # -- planning --------------------------------------------------------------------------------

    def allocate(self, cluster: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(guest cluster, clusters, host offset) of new places: right behind those of the clusters
        before, as far as it is free there."""
        space, runs = self.mapping.space, self.runs
        goal = 0
        if runs and runs[-1].cluster + runs[-1].clusters == cluster:
            goal = runs[-1].host_offset + (runs[-1].clusters << self.mapping.cluster_bits)
        while count:
            host, found = space.allocate(cluster, count, goal)
            # What follows did not fit there.
            goal = 0
            yield cluster, found, host
            cluster += found
            count -= found

    def add_run(self, run: Run) -> None:
        runs = self.runs
        # Known to the write at once: whatever fails from here on gives it back.
        runs.append(run)
        if not run.is_new:
            self.mapping.space.check(run.host_offset, run.clusters)
            self.mapping.space.needed(run.host_offset, run.clusters)
        if len(runs) > 1:
            last = runs[-2]
            if (
                last.is_new == run.is_new
                and last.cluster + last.clusters == run.cluster
                and last.host_offset + (last.clusters << self.mapping.cluster_bits)
                == run.host_offset
            ):
                bitmaps = None if last.bitmaps is None else last.bitmaps + (run.bitmaps or _NONE)
                runs[-2:] = [
                    last._replace(clusters=last.clusters + run.clusters, bitmaps=bitmaps)
                ]

    def add_piece(self, piece: Piece, *, is_new: bool = False) -> None:
        """``is_new``: in clusters that were allocated for this write."""
        mapping = self.mapping
        # What the file has never held reads as zeroes once it is long enough.
        first = piece.host_offset - piece.copy_head
        piece = piece._replace(reads_zero=is_new and first >= mapping.data_node.size)
        if mapping.encryption is not None:
            piece = _encrypted(piece, mapping.encryption)
        pieces = self.pieces
        if pieces and _joins(pieces[-1], piece):
            before = pieces[-1]
            pieces[-1] = before._replace(
                length=before.length + piece.length,
                copy_tail=piece.copy_tail,
                reads_zero=before.reads_zero and piece.reads_zero,
            )
        else:
            pieces.append(piece)


_NONE: array[int] = array("Q")


def reserve(mapping: Qcow2Mapping, ranges: Sequence[tuple[int, int]]) -> Reservation:
    write = Write(mapping)
    planner: type[Planner] = StandardPlanner
    if mapping.header.extended_l2:
        from lamina.formats.qcow2.subwriting import ExtendedPlanner

        planner = ExtendedPlanner
    try:
        for offset, length in ranges:
            planner(mapping, write, offset, length).plan()
    except BaseException:
        write.abort()
        raise
    return write if write.runs else InPlace(write.pieces)


class Planner(ABC):
    """The pieces and runs of one range."""

    def __init__(self, mapping: Qcow2Mapping, write: Write, offset: int, length: int) -> None:
        self.mapping = mapping
        self.write = write
        self.start = offset
        self.end = offset + length
        self.bits = mapping.cluster_bits
        self.unit = mapping.cluster_size

    def plan(self) -> None:
        bits, tables = self.bits, self.mapping.tables
        cluster = self.start >> bits
        end = ((self.end - 1) >> bits) + 1
        while cluster < end:
            tables.prepare(cluster)
            # One L2 table at a time.
            stop = min(((cluster >> tables.l2_bits) + 1) << tables.l2_bits, end)
            for first, _, entries in tables.walk(cluster, stop - cluster):
                assert entries is not None
                self.plan_entries(first, entries)
            cluster = stop

    @abstractmethod
    def plan_entries(self, cluster: int, entries: array[int]) -> None:
        """Cut the entries into runs that share a fate."""

    def our_place(self, cluster: int, entry: int) -> int:
        """Of the host cluster that nobody shares with us; -1: none. Raises ImageCorrupt."""
        if not entry & COPIED or entry & COMPRESSED:
            return -1
        mapping = self.mapping
        host = mapping.space.place(entry)
        if host < 0:
            return -1
        if host & (self.unit - 1):
            offset = max(cluster * self.unit, self.start)
            raise mapping.corruption.found(
                f"Data cluster offset {c_hex(host)} unaligned (guest offset: {c_hex(offset)})",
                structure="L2 table",
            )
        mapping.space.check_entry(cluster, host)
        return host


class StandardPlanner(Planner):
    def plan_entries(self, cluster: int, entries: array[int]) -> None:
        position = 0
        total = len(entries)
        while position < total:
            entry = entries[position]
            start = position
            position += 1
            host = self.our_place(cluster + start, entry)
            if host >= 0:
                expected = entry + self.unit
                while position < total and entries[position] == expected:
                    expected += self.unit
                    position += 1
                run = Run(cluster + start, position - start, host, is_new=False)
                if entry & ZERO_FLAG:
                    self._add_run(run)
                else:
                    self.mapping.space.check(host, run.clusters)
                    self._add_piece(run, fresh=False)
                continue
            while position < total and self.our_place(cluster + position, entries[position]) < 0:
                position += 1
            for first, count, host in self.write.allocate(cluster + start, position - start):
                self._add_run(Run(first, count, host, is_new=True))

    def _add_run(self, run: Run) -> None:
        self.write.add_run(run)
        self._add_piece(run, fresh=True)

    def _add_piece(self, run: Run, *, fresh: bool) -> None:
        """The part of the range that these clusters hold, with what must be copied around it."""
        first = run.cluster * self.unit
        last = first + run.clusters * self.unit
        start, end = max(first, self.start), min(last, self.end)
        piece = Piece(
            start,
            end - start,
            self.mapping.data_node,
            run.host_offset + start - first,
            copy_head=start - first if fresh else 0,
            copy_tail=last - end if fresh else 0,
            fresh=fresh,
        )
        self.write.add_piece(piece, is_new=run.is_new)


def _encrypted(piece: Piece, encryption: Encryption) -> Piece:
    """Zeroes are not zeroes any more when they are encrypted."""
    return piece._replace(
        reads_zero=False,
        cipher=encryption.cipher,
        first_sector=encryption.sector(
            piece.guest_offset - piece.copy_head, piece.host_offset - piece.copy_head
        ),
    )


def _joins(before: Piece, piece: Piece) -> bool:
    return (
        before.fresh == piece.fresh
        and not before.copy_tail
        and not piece.copy_head
        and before.guest_offset + before.length == piece.guest_offset
        and before.host_offset + before.length == piece.host_offset
    )


# -- compressed clusters -------------------------------------------------------------------------


class EncodedWrite(Reservation):
    """Compressed clusters that wait to be named by the L2 tables."""

    def __init__(self, mapping: Qcow2Mapping) -> None:
        self.mapping = mapping
        self.pieces: list[Piece] = []

    def commit(self) -> None:
        mapping = self.mapping
        bits = mapping.cluster_bits
        freed: list[Freed] = []
        done = 0
        try:
            mapping.corruption.check()
            for piece in self.pieces:
                cluster = piece.guest_offset >> bits
                old = mapping.tables.entry(cluster)
                entry = compressed_entry(piece.host_offset, piece.length, bits)
                # With extended L2 entries, the bitmap of such a cluster is empty.
                words = [entry, 0][: mapping.tables.entry_words]
                mapping.tables.store(cluster, array("Q", words))
                done += 1
                freed += mapping.space.references(old, bits, Cause.OTHER)
            mapping.file.event("l2_update_compressed")
        except BaseException:
            self.pieces = self.pieces[done:]
            self.abort()
            raise
        finally:
            mapping.allocator.free_later(freed)

    def abort(self) -> None:
        for piece in self.pieces:
            self.mapping.allocator.cancel_bytes(piece.host_offset, piece.length)


def reserve_encoded(mapping: Qcow2Mapping, units: Sequence[tuple[int, int]]) -> Reservation:
    write = EncodedWrite(mapping)
    try:
        for guest_offset, length in units:
            mapping.tables.prepare(guest_offset >> mapping.cluster_bits)
            host = mapping.allocator.allocate_bytes(length)
            write.pieces.append(Piece(guest_offset, length, mapping.file, host, fresh=True))
            mapping.overlap.check(host, length)
    except BaseException:
        write.abort()
        raise
    return write
