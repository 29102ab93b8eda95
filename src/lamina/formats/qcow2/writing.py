"""Places for writes: in place where a cluster is ours alone, else in new clusters.

Nothing is published before ``commit``: until then the L2 tables name the old clusters, and nobody
but the reservation knows of the new ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lamina.engine.mapping import InPlace, Piece, Reservation
from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO_FLAG,
    compressed_entry,
    compressed_extent,
)

if TYPE_CHECKING:
    from lamina.formats.qcow2.encryption import Encryption
    from lamina.formats.qcow2.mapping import Qcow2Mapping


class Run(NamedTuple):
    """Guest clusters that one write turns into data clusters, one behind the other."""

    cluster: int
    clusters: int
    host_offset: int
    is_new: bool
    """Allocated for this write; otherwise preallocated zero clusters that become data."""


def references(entry: int, cluster_bits: int, cause: Cause) -> list[Freed]:
    """The host clusters that an L2 entry refers to."""
    if entry & COMPRESSED:
        offset, length = compressed_extent(entry, cluster_bits)
        first = offset >> cluster_bits
        last = (offset + length - 1) >> cluster_bits
        return [Freed(first, last - first + 1, cause)]
    offset = entry & OFFSET_MASK
    return [Freed(offset >> cluster_bits, 1, cause)] if offset else []


class Write(Reservation):
    """Runs that wait to be named by the L2 tables."""

    def __init__(self, mapping: Qcow2Mapping) -> None:
        self.mapping = mapping
        self.pieces: list[Piece] = []
        self.runs: list[Run] = []

    def commit(self) -> None:
        mapping = self.mapping
        unit, tables = mapping.unit, mapping.tables
        freed: list[Freed] = []
        try:
            mapping.corruption.check()
            for number, run in enumerate(self.runs):
                for cluster, part, entries in tables.walk(run.cluster, run.clusters):
                    # Only loading a table can fail, and this part of it is loaded.
                    host = run.host_offset + (cluster - run.cluster) * unit
                    tables.store(cluster, entry_run(host, part, unit))
                    if run.is_new and entries is not None:
                        freed += _replaced(entries, mapping.cluster_bits)
                    end = run.cluster + run.clusters
                    self.runs[number] = Run(
                        cluster + part, end - cluster - part, host + part * unit, run.is_new
                    )
        except BaseException:
            self.abort()
            raise
        finally:
            mapping.allocator.free_later(freed)

    def abort(self) -> None:
        for run in self.runs:
            if run.is_new and run.clusters:
                self.mapping.allocator.cancel(run.host_offset, run.clusters)


def _replaced(entries: array[int], cluster_bits: int) -> Iterator[Freed]:
    """What the old entries referred to."""
    for entry in entries:
        if entry:
            yield from references(entry, cluster_bits, Cause.OTHER)


def entry_run(host_offset: int, clusters: int, unit: int) -> array[int]:
    """L2 entries of data clusters that lie one behind the other and belong to nobody else."""
    first = host_offset | COPIED
    return array("Q", range(first, first + clusters * unit, unit))


def reserve(mapping: Qcow2Mapping, ranges: Sequence[tuple[int, int]]) -> Reservation:
    write = Write(mapping)
    try:
        for offset, length in ranges:
            _Planner(mapping, write, offset, length).plan()
    except BaseException:
        write.abort()
        raise
    return write if write.runs else InPlace(write.pieces)


class _Planner:
    """The pieces and runs of one range."""

    def __init__(self, mapping: Qcow2Mapping, write: Write, offset: int, length: int) -> None:
        self.mapping = mapping
        self.write = write
        self.start = offset
        self.end = offset + length

    def plan(self) -> None:
        bits, tables = self.mapping.cluster_bits, self.mapping.tables
        cluster = self.start >> bits
        end = ((self.end - 1) >> bits) + 1
        while cluster < end:
            tables.prepare(cluster)
            # One L2 table at a time.
            stop = min(((cluster >> tables.l2_bits) + 1) << tables.l2_bits, end)
            for first, _, entries in tables.walk(cluster, stop - cluster):
                assert entries is not None
                self._plan_entries(first, entries)
            cluster = stop

    def _plan_entries(self, cluster: int, entries: array[int]) -> None:
        """Cut the entries into runs that share a fate."""
        unit = self.mapping.unit
        position = 0
        total = len(entries)
        while position < total:
            entry = entries[position]
            start = position
            position += 1
            if self._is_ours(cluster + start, entry):
                expected = entry + unit
                while position < total and entries[position] == expected:
                    expected += unit
                    position += 1
                host = entry & OFFSET_MASK
                count = position - start
                if entry & ZERO_FLAG:
                    self._add_run(Run(cluster + start, count, host, is_new=False))
                else:
                    self._check(host, count)
                    self._add_piece(cluster + start, count, host)
                continue
            while position < total and not self._is_ours(cluster + position, entries[position]):
                position += 1
            self._allocate(cluster + start, position - start)

    def _is_ours(self, cluster: int, entry: int) -> bool:
        """There is a host cluster that nobody shares with us. Raises ImageCorrupt."""
        if not entry & COPIED or entry & COMPRESSED or not entry & OFFSET_MASK:
            return False
        mapping = self.mapping
        host = entry & OFFSET_MASK
        if host & (mapping.unit - 1):
            raise mapping.corruption.found(
                f"Data cluster offset {c_hex(host)} unaligned "
                f"(guest offset: {c_hex(cluster * mapping.unit)})",
                structure="L2 table",
            )
        return True

    def _check(self, host_offset: int, count: int) -> None:
        self.mapping.overlap.check(host_offset, count * self.mapping.unit)

    def _allocate(self, cluster: int, count: int) -> None:
        """New places: right behind those of the clusters before, as far as it is free there."""
        allocator, runs = self.mapping.allocator, self.write.runs
        if runs and runs[-1].cluster + runs[-1].clusters == cluster:
            goal = runs[-1].host_offset + runs[-1].clusters * self.mapping.unit
            found = allocator.allocate_at(goal, count)
            if found:
                self._add_run(Run(cluster, found, goal, is_new=True))
                cluster += found
                count -= found
        if count:
            host = allocator.allocate(count)
            self._add_run(Run(cluster, count, host, is_new=True))

    def _add_run(self, run: Run) -> None:
        runs, unit = self.write.runs, self.mapping.unit
        # Known to the write at once: whatever fails from here on gives it back.
        runs.append(run)
        if not run.is_new:
            self._check(run.host_offset, run.clusters)
        if len(runs) > 1:
            last = runs[-2]
            if (
                last.is_new == run.is_new
                and last.cluster + last.clusters == run.cluster
                and last.host_offset + last.clusters * unit == run.host_offset
            ):
                runs[-2:] = [last._replace(clusters=last.clusters + run.clusters)]
        self._add_piece(run.cluster, run.clusters, run.host_offset, run)

    def _add_piece(
        self, cluster: int, count: int, host_offset: int, run: Run | None = None
    ) -> None:
        """The part of the range that these clusters hold, with what must be copied around it."""
        mapping = self.mapping
        unit = mapping.unit
        first = cluster * unit
        last = first + count * unit
        start, end = max(first, self.start), min(last, self.end)
        fresh = run is not None
        piece = Piece(
            start,
            end - start,
            mapping.data_node,
            host_offset + start - first,
            copy_head=start - first if fresh else 0,
            copy_tail=last - end if fresh else 0,
            fresh=fresh,
            # What the file has never held reads as zeroes once it is long enough.
            reads_zero=run is not None and run.is_new and host_offset >= mapping.file.size,
        )
        if mapping.encryption is not None:
            piece = _encrypted(piece, mapping.encryption)
        pieces = self.write.pieces
        if pieces and _joins(pieces[-1], piece):
            before = pieces[-1]
            pieces[-1] = before._replace(
                length=before.length + piece.length,
                copy_tail=piece.copy_tail,
                reads_zero=before.reads_zero and piece.reads_zero,
            )
        else:
            pieces.append(piece)


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
                mapping.tables.store(cluster, array("Q", [entry]))
                done += 1
                freed += references(old, bits, Cause.OTHER)
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
