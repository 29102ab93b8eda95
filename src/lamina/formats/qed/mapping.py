"""Where guest bytes live in a QED image: two levels of tables, everything appended at the end.

There are no counts of references, so nothing is ever freed; a cluster that nobody names after a
crash is a leak. Data is written first, then the L2 entry that names it, then the L1 entry that
names a new L2 table. In that order a crash leaves nothing worse than leaks; the mark NEED_CHECK is
set all the same while clusters are being allocated, for whoever opens the image next to find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.filenames import full_backing_filename
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.appending import Appender
from lamina.engine.coalescing import columns_of_units, extents_of_units
from lamina.engine.mapping import Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.errors import ImageCorrupt, ImageUnsupported, UsageError
from lamina.formats.qed.layout import (
    AUTOCLEAR_OFFSET,
    FEATURES_OFFSET,
    IMAGE_SIZE_OFFSET,
    MIN_CLUSTER,
    NEED_CHECK,
    ZERO_CLUSTER,
    Header,
)
from lamina.formats.qed.tables import Tables
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import WriteRequest
    from lamina.engine.disk import Disk

_KINDS = {0: Kind.BELOW, ZERO_CLUSTER: Kind.ZERO}


class QedMapping(Mapping):
    driver = "qed"
    discard_unit = MIN_CLUSTER

    def __init__(
        self, disk: Disk, header: Header, backing_name: str | None, backing_format: str | None
    ) -> None:
        """The tables of an image whose header is sound."""
        self.disk = disk
        self.file = self.data_node = disk.file
        self.header = header
        self.backing_name = backing_name
        self.backing_format = backing_format
        self.size = header.image_size
        self.unit = header.cluster_size
        self.metadata = Metadata(self.file)
        self.appender = Appender(self.file, round_up(self.file.size, self.unit))
        self.tables = Tables(self.file, header, self.metadata, self.appender)

    # -- reading ---------------------------------------------------------------------------------

    def _check_place(self, cluster: int, place: int) -> None:
        """Raises ImageCorrupt unless there can be data at ``place``."""
        unit = self.unit
        if place % unit or not self.header.header_bytes <= place < self.appender.end:
            raise ImageCorrupt(
                f"Cluster offset {place:#x} is invalid",
                path=self.file.filename,
                format="qed",
                structure="L2 table",
                field=f"entry of guest offset {cluster * unit:#x}",
            )

    def resolve(self, offset: int, length: int) -> list[Extent]:
        return extents_of_units(offset, offset + length, self._units(offset, length), self.file)

    def _units(self, offset: int, length: int) -> Iterator[tuple[int, Kind, int]]:
        unit = self.unit
        first = offset // unit
        count = -(-(offset + length) // unit) - first
        for start, _, entries in self.tables.runs(first, count):
            if entries is None:
                yield start * unit, Kind.BELOW, -1
                continue
            for cluster, _, entry in self._runs(start, entries):
                kind = _KINDS.get(entry)
                if kind is not None:
                    yield cluster * unit, kind, -1
                else:
                    yield cluster * unit, Kind.DATA, entry

    def _runs(self, first: int, entries: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(cluster, how many, the first one's entry) of clusters that lie one behind the other, or
        have the same entry. ``entries``: those of the clusters from ``first`` on.

        Raises ImageCorrupt where there can be no data.
        """
        unit, end_of_file = self.unit, self.appender.end
        start, opening = first, 0
        # The entry that would carry the run on, and what it grows by from cluster to cluster.
        expected, step = -1, 0
        for cluster, entry in enumerate(entries, first):
            if entry == expected and entry < end_of_file:
                expected += step
                continue
            if cluster > first:
                yield start, cluster - start, opening
            start, opening, step = cluster, entry, 0
            if entry > ZERO_CLUSTER:
                self._check_place(cluster, entry)
                step = unit
            expected = entry + step
        yield start, first + len(entries) - start, opening

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        import numpy as np

        unit, end = self.unit, offset + length
        first = offset // unit
        done = offset  # all before it has been yielded, and from there on nothing is there
        for index, count, stored in self.tables.runs(first, -(-end // unit) - first):
            if stored is None:
                continue
            start, stop = max(offset, index * unit), min((index + count) * unit, end)
            if done < start:
                yield Columns.from_extents([Extent(done, start - done, Kind.BELOW)])
            done = stop
            entries = np.array(stored, dtype=np.uint64)
            data = entries > ZERO_CLUSTER
            places = entries[data]
            wrong = (places % unit != 0) | (places < self.header.header_bytes)
            wrong |= places >= self.appender.end
            if wrong.any():
                place = int(wrong.argmax())
                self._check_place(index + int(np.flatnonzero(data)[place]), int(places[place]))
            kind = np.where(data, Kind.DATA, np.where(entries == 0, Kind.BELOW, Kind.ZERO))
            host = np.where(data, entries.astype(np.int64), -1)
            yield columns_of_units(
                start, stop, index * unit, unit, kind.astype(np.uint8), host, self.file
            )
        if done < end:
            yield Columns.from_extents([Extent(done, end - done, Kind.BELOW)])

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        return [self._spot(offset, len(buffer)) for offset, buffer in requests]

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        return [self._spot(offset, len(data)) for offset, data in requests]

    def _spot(self, offset: int, length: int) -> int:
        """Host offset of a range inside of one allocated cluster, or -1."""
        cluster, skip = divmod(offset, self.unit)
        if not 0 < length <= self.unit - skip:
            return -1
        entry = self.tables.entry(cluster)
        if entry <= ZERO_CLUSTER:
            return -1
        self._check_place(cluster, entry)
        return entry + skip

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        for offset, length in ranges:
            self._need_tables(offset, length)
        reservation = QedReservation(self)
        try:
            for offset, length in ranges:
                self._reserve_range(reservation, offset, offset + length)
            if reservation.new:
                self._mark()
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def _need_tables(self, offset: int, length: int) -> None:
        """L2 tables for a range: they stay even if what needed them fails."""
        per_table = self.header.table_entries * self.unit
        for index in range(offset // per_table, -(-(offset + length) // per_table)):
            if not self.tables.l2_table(index):
                self._mark()
                self.tables.need_table(index)

    def _reserve_range(self, reservation: QedReservation, offset: int, end: int) -> None:
        unit = self.unit
        first = offset // unit
        for start, _, entries in self.tables.runs(first, -(-end // unit) - first):
            assert entries is not None
            for cluster, count, entry in self._runs(start, entries):
                guest = cluster * unit
                lo, hi = max(guest, offset), min(guest + count * unit, end)
                if entry > ZERO_CLUSTER:
                    piece = Piece(lo, hi - lo, self.file, entry + lo - guest)
                else:
                    piece = reservation.append(cluster, count, lo, hi)
                reservation.pieces.append(piece)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """What is not there becomes a zero cluster; what is, the engine zeroes where it is."""
        unit = self.unit
        done = True
        for extent in self.resolve(offset, length):
            if extent.kind is Kind.DATA:
                done = False
            elif extent.kind is Kind.BELOW and (self.backing_name or self.disk.backing):
                self._need_tables(extent.guest_offset, extent.length)
                for cluster in range(extent.guest_offset // unit, -(-extent.end // unit)):
                    self.tables.set_entry(cluster, ZERO_CLUSTER)
        return done

    def discard(self, offset: int, length: int) -> None:
        """Clusters stay where they are, for they could not be used again. Their storage goes."""
        for extent in self.resolve(offset, length):
            if extent.kind is Kind.DATA:
                self.file.discard(extent.host_offset, extent.length)

    # -- the header ------------------------------------------------------------------------------

    def before_first_write(self) -> None:
        """Section "Header": autoclear features that nobody here keeps up to date are cleared."""
        if self.header.autoclear_features:
            self.header = replace(self.header, autoclear_features=0)
            self.metadata.put(Stage.COUNTS, AUTOCLEAR_OFFSET, bytes(8))

    def _mark(self) -> None:
        """NEED_CHECK is durable before the file grows. Raises StorageError."""
        features = self.header.features | NEED_CHECK
        if features != self.header.features:
            self.file.write(FEATURES_OFFSET, features.to_bytes(8, "little"))
            self.file.flush()
            self.header = replace(self.header, features=features)

    def close(self) -> None:
        """Everything is written: the tables need no check."""
        self.appender.trim()
        self.mark_clean()

    def mark_clean(self) -> None:
        if self.header.features & NEED_CHECK:
            features = self.header.features & ~NEED_CHECK
            self.header = replace(self.header, features=features)
            self.metadata.put(Stage.FREES, FEATURES_OFFSET, features.to_bytes(8, "little"))

    def reopened(self, *, read_only: bool) -> None:
        if not read_only:
            self.repair_after_crash()

    def repair_after_crash(self) -> None:
        """An image that is marked is checked before anything is allocated in it."""
        if self.header.features & NEED_CHECK:
            from lamina.formats.qed.check import repair

            repair(self)

    # -- the whole -------------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        if preallocation is not Preallocation.OFF:
            raise ImageUnsupported(f"Unsupported preallocation mode '{preallocation.value}'")
        if size % SECTOR or size > self.header.max_image_size:
            raise UsageError("Invalid image size specified", field="size")
        if size < self.size:
            raise ImageUnsupported("Shrinking images is currently not supported")
        self.header = replace(self.header, image_size=size)
        self.size = size
        self.metadata.put(Stage.ROOTS, IMAGE_SIZE_OFFSET, size.to_bytes(8, "little"))

    def info(self) -> NodeInfo:
        name = self.backing_name
        return NodeInfo(
            self.disk.filename,
            "qed",
            self.size,
            self.file.info().actual_size,
            cluster_size=self.unit,
            backing_filename=name,
            full_backing_filename=full_backing_filename(self.disk, name) if name else None,
            backing_format=self.backing_format,
        )


class QedReservation(Reservation):
    """Clusters at the end of the file that no table names yet."""

    def __init__(self, mapping: QedMapping) -> None:
        self.pieces: list[Piece] = []
        self.new: list[tuple[int, int, int]] = []
        """Guest cluster, how many, and the host offset of their new places."""
        self._mapping = mapping
        self._start = self._end = mapping.appender.end

    def append(self, cluster: int, count: int, start: int, end: int) -> Piece:
        """New places for clusters, of which the guest writes from ``start`` to ``end``. Their
        entries lie in one part of an L2 table."""
        mapping = self._mapping
        unit = mapping.unit
        place, untouched = mapping.appender.take(count * unit, unit)
        self._end = mapping.appender.end
        self.new.append((cluster, count, place))
        head = start - cluster * unit
        return Piece(
            start,
            end - start,
            mapping.file,
            place + head,
            copy_head=head,
            copy_tail=(cluster + count) * unit - end,
            fresh=True,
            reads_zero=untouched,
        )

    def commit(self) -> None:
        mapping = self._mapping
        if self.new:
            try:
                mapping.appender.reach(self._end)
            except BaseException:
                self.abort()
                raise
        for cluster, count, place in self.new:
            mapping.tables.set_places(cluster, count, place)

    def abort(self) -> None:
        self._mapping.appender.give_back(self._start, self._end)
