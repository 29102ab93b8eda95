"""Where the guest bytes of a qcow2 image are, and how that changes.

This class answers the engine; what it knows is in the parts it is made of: ``l2`` (L1 and L2
tables), ``reading`` and ``subclusters`` (what their entries mean), ``space``, ``refcounts`` and
``allocation`` (host clusters), ``overlap`` and ``corruption`` (guards), ``writing`` and
``clearing`` (changes), ``header`` and ``resize`` (the image as a whole).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata
from lamina.errors import Refused
from lamina.formats.qcow2.allocation import Allocator
from lamina.formats.qcow2.corruption import Corruption
from lamina.formats.qcow2.l2 import Tables
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA_FILE,
    INCOMPAT_CORRUPT,
    Header,
    compressed_extent,
)
from lamina.formats.qcow2.options import Options
from lamina.formats.qcow2.overlap import Overlap
from lamina.formats.qcow2.reading import Reading, Standard
from lamina.formats.qcow2.refcounts import Refcounts, read_table
from lamina.formats.qcow2.settings import Settings
from lamina.formats.qcow2.space import DataFileSpace, ImageSpace, Space
from lamina.hints import TYPE_CHECKING
from lamina.units import MIB, SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node, WriteRequest
    from lamina.block.permissions import Perm
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.bitmap_layout import BitmapEntry
    from lamina.formats.qcow2.bitmaps import Bitmaps
    from lamina.formats.qcow2.encryption import Encryption
    from lamina.formats.qcow2.snapshot_layout import Snapshot


class Qcow2Mapping(Mapping):
    driver = "qcow2"

    def __init__(
        self,
        file: Node,
        header: Header,
        options: Options,
        *,
        settings: Settings | None = None,
        snapshots: Sequence[Snapshot] = (),
        bitmaps: Sequence[BitmapEntry] = (),
        read_only: bool,
        unmap: bool = False,
        disk: Disk | None = None,
        data_file: Node | None = None,
        encryption: Encryption | None = None,
        warn: Callable[[str], None],
    ) -> None:
        """``disk``: the node around it; None while an image is created.

        ``data_file``: where the guest data is, if not in ``file``.
        """
        self.disk = disk
        self.file = file
        self.header = header
        self.options = options
        self.settings = settings or Settings(options, header)
        self.snapshots = list(snapshots)
        self._bitmaps: Bitmaps | None = None
        self._bitmap_entries = list(bitmaps)
        self.read_only = read_only
        self.unmap = unmap
        self.warn = warn
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.unit = header.subcluster_size
        self.allocation_unit = self.encoded_unit = header.cluster_size
        self.codec = header.compression_name
        self.encryption = encryption
        if encryption is not None:
            self.request_alignment = SECTOR
        if encryption is not None or data_file is not None:
            self.encoded_unit = 0
        self.cluster_bits = header.cluster_bits
        # Small caches mean little memory: for what is not written yet as well.
        self.metadata = Metadata(file, limit=min(max(self.settings.l2_cache, MIB), 8 * MIB))
        self.corruption = Corruption(file, header, warn, read_only=read_only)
        self._writable_parts: tuple[Refcounts, Allocator] | None = None
        self.overlap = Overlap(file, header, self.corruption)
        self.overlap.watched = self.settings.overlap
        self.overlap.snapshots = self.snapshots
        self.overlap.refcount_table = lambda: self.refcounts.table
        self.tables = Tables(
            file,
            header,
            self.metadata,
            self.overlap,
            self.corruption,
            lambda: self.allocator,
            cache_bytes=self.settings.l2_cache,
            slice_bytes=self.settings.l2_slice,
        )
        self.overlap.l1 = self.tables.l1
        self.space: Space = (
            ImageSpace(self) if data_file is None else DataFileSpace(self, data_file)
        )
        self.data_node = self.space.node
        if header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE:
            self.raw_node = data_file
        self.reading = self._reading()

    def _reading(self) -> Reading:
        if self.header.extended_l2:
            from lamina.formats.qcow2.subclusters import Extended

            return Extended(self)
        return Standard(self)

    def backing(self) -> Node | None:
        """The backing file as it is now: jobs exchange it."""
        return None if self.disk is None else self.disk.backing

    def check_usable(self) -> None:
        """Raises StorageError for an image that was found to be corrupt."""
        self.corruption.check()

    def reload(self) -> None:
        """The tables of the file were changed behind our back, by a repair."""
        header, tables = self.header, self.tables
        tables.l1[:] = read_table(self.file, header.l1_table_offset, header.l1_size)
        tables.cache.drop_clean()
        if self._writable_parts is not None:
            refcounts, allocator = self._writable_parts
            refcounts.reload()
            allocator.restart()
        self.overlap.forget()

    # -- what writing needs, made when it is first needed ----------------------------------------

    @property
    def refcounts(self) -> Refcounts:
        return self._parts()[0]

    @property
    def allocator(self) -> Allocator:
        return self._parts()[1]

    def _parts(self) -> tuple[Refcounts, Allocator]:
        if self._writable_parts is None:
            refcounts = Refcounts(
                self.file,
                self.header,
                self.metadata,
                self.overlap,
                self.corruption,
                self.settings.refcount_cache,
            )
            allocator = Allocator(
                self.file,
                self.header,
                self.metadata,
                refcounts,
                self.overlap,
                self.corruption,
            )
            allocator.configure(self.options, unmap=self.unmap)
            allocator.l2_cache = self.tables.cache
            self._writable_parts = refcounts, allocator
        return self._writable_parts

    @property
    def has_bitmaps(self) -> bool:
        """There are persistent bitmaps, or have been."""
        return bool(self._bitmap_entries) or self._bitmaps is not None

    @property
    def bitmaps(self) -> Bitmaps:
        if self._bitmaps is None:
            from lamina.formats.qcow2.bitmaps import Bitmaps

            self._bitmaps = Bitmaps(self, self._bitmap_entries)
        return self._bitmaps

    @bitmaps.setter
    def bitmaps(self, bitmaps: Bitmaps) -> None:
        self._bitmaps = bitmaps

    @property
    def vmstate_offset(self) -> int:  # type: ignore[override]
        """Behind the last guest address that the L2 tables of the disk cover."""
        per_table = self.header.l2_entries << self.cluster_bits
        return -(-self.header.size // per_table) * per_table

    # -- reading ---------------------------------------------------------------------------------

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        if self.corruption.marked:
            self.check_usable()
        return None if self.encryption else self.reading.locate(requests, writing=False)

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        if self.corruption.marked:
            self.check_usable()
        if self.encryption is not None:
            return None
        places = self.reading.locate(requests, writing=True)
        if places is not None and not self.space.external:
            occupied, bits = self.overlap.occupied, self.cluster_bits
            for place in places:
                if place >> bits in occupied:
                    self.overlap.check(place, 1)
        return places

    def resolve(self, offset: int, length: int) -> list[Extent]:
        self.check_usable()
        bits = self.cluster_bits
        first = offset >> bits
        count = ((offset + length - 1) >> bits) - first + 1 if length else 0
        extents: list[Extent] = []
        for guest, size, kind, host, entry in self.reading.runs(first, count):
            start = max(guest, offset)
            stop = min(guest + size, offset + length)
            if start >= stop:
                # Beside the range, but in a cluster that it touches.
                continue
            if kind is Kind.ENCODED:
                extents.append(self._encoded(guest, start, stop, entry))
                continue
            if host >= 0:
                host += start - guest
            if extents:
                last = extents[-1]
                if last.kind is kind and (
                    host < 0 > last.host_offset
                    if host < 0
                    else last.host_offset + last.length == host and last.host_offset >= 0
                ):
                    extents[-1] = last._replace(length=last.length + stop - start)
                    continue
            node = None if host < 0 else self.data_node
            extent = Extent(start, stop - start, kind, node, host)
            if self.encryption is not None and kind is Kind.DATA:
                cipher, sector = self.encryption.cipher, self.encryption.sector(start, host)
                extent = extent._replace(cipher=cipher, first_sector=sector)
            extents.append(extent)
        return extents

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        from lamina.formats.qcow2.columns import columns

        return columns(self, offset, length)

    def _encoded(self, unit: int, start: int, stop: int, entry: int) -> Extent:
        host, stored = compressed_extent(entry, self.cluster_bits)
        return Extent(
            start,
            stop - start,
            Kind.ENCODED,
            self.file,
            host,
            stored_length=stored,
            codec=self.codec,
            unit_offset=unit,
            unit_length=self.cluster_size,
        )

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        from lamina.formats.qcow2.writing import reserve

        self.check_usable()
        return reserve(self, ranges)

    def reserve_encoded(self, units: Sequence[tuple[int, int]]) -> Reservation:
        from lamina.formats.qcow2.writing import reserve_encoded

        self.check_usable()
        return reserve_encoded(self, units)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        from lamina.formats.qcow2.clearing import zero

        self.check_usable()
        return zero(self, offset, length, may_unmap)

    def discard(self, offset: int, length: int) -> None:
        from lamina.formats.qcow2.clearing import discard

        self.check_usable()
        discard(self, offset >> self.cluster_bits, length >> self.cluster_bits)

    # -- the whole -------------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.qcow2.resize import resize

        self.check_usable()
        resize(self, size, preallocation)

    def uses_more_than(self, length: int) -> bool:
        return self.refcounts.uses_more_than(length // self.header.cluster_size)

    def info(self) -> NodeInfo:
        from lamina.formats.qcow2.about import describe

        assert self.disk is not None
        entries = self.bitmaps.entries if self.has_bitmaps else ()
        return describe(self.disk, self.header, self.snapshots, entries)

    def before_first_write(self) -> None:
        from lamina.formats.qcow2.header import open_for_changes

        self.check_usable()
        open_for_changes(self)
        if self.has_bitmaps:
            self.bitmaps.before_first_write()

    def flush(self) -> None:
        if not self.corruption.marked:
            self.metadata.commit()

    def child_permissions(
        self, role: str, perm: Perm, shared: Perm, read_only: bool
    ) -> tuple[Perm, Perm] | None:
        if role != "data-file":
            return None
        from lamina.formats.qcow2.data_file import permissions

        assert self.disk is not None
        return permissions(self.disk, shared, read_only)

    def reopened(self, *, read_only: bool) -> None:
        if not read_only:
            self.refuse_if_corrupt()
        self.read_only = self.corruption.read_only = read_only

    def refuse_if_corrupt(self) -> None:
        """Raises Refused if the image may only be read."""
        if self.header.incompatible_features & INCOMPAT_CORRUPT:
            raise Refused(
                "qcow2: Image is corrupt; cannot be opened read/write", errno=errno.EACCES
            )

    def close(self) -> None:
        from lamina.formats.qcow2.header import close_cleanly

        if self.corruption.marked:
            return
        if self.has_bitmaps:
            self.bitmaps.store_finally()
        close_cleanly(self)

