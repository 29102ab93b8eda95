"""Where the guest bytes of a qcow2 image are, and how that changes.

This class answers the engine; what it knows is in the parts it is made of: ``l2`` (L1 and L2
tables), ``refcounts`` and ``allocation`` (host clusters), ``overlap`` and ``corruption`` (guards),
``writing`` and ``clearing`` (changes), ``header`` and ``resize`` (the image as a whole).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata
from lamina.errors import ImageUnsupported, LaminaError, Refused
from lamina.formats.qcow2.allocation import Allocator
from lamina.formats.qcow2.corruption import Corruption, c_hex
from lamina.formats.qcow2.l2 import Tables
from lamina.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    INCOMPAT_CORRUPT,
    OFFSET_MASK,
    ZERO_FLAG,
    Header,
    Snapshot,
    compressed_extent,
)
from lamina.formats.qcow2.options import Options
from lamina.formats.qcow2.overlap import Overlap
from lamina.formats.qcow2.refcounts import Refcounts, read_table
from lamina.formats.qcow2.settings import Settings
from lamina.units import MIB, SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node, WriteRequest
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.bitmap_layout import BitmapEntry
    from lamina.formats.qcow2.bitmaps import Bitmaps
    from lamina.formats.qcow2.encryption import Encryption

_unpack_entry = struct.Struct(">Q").unpack_from

WRITABLE = COPIED | COMPRESSED | ZERO_FLAG
"""An entry may be written in place if of these bits it has COPIED alone."""


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
        refusal: str | None = None,
        encryption: Encryption | None = None,
        warn: Callable[[str], None],
    ) -> None:
        """``disk``: the node around it; None while an image is created.

        ``refusal``: why guest data cannot be reached, in an image that is opened all the same to be
        checked.
        """
        self.disk = disk
        self.file = self.data_node = file
        self.header = header
        self.options = options
        self.settings = settings or Settings(options, header)
        self.snapshots = list(snapshots)
        self._bitmaps: Bitmaps | None = None
        self._bitmap_entries = list(bitmaps)
        self.read_only = read_only
        self.unmap = unmap
        self.refusal = refusal
        self.warn = warn
        self.size = header.size
        self.unit = self.encoded_unit = header.cluster_size
        self.codec = header.compression_name
        self.encryption = encryption
        if encryption is not None:
            self.request_alignment = SECTOR
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

    def backing(self) -> Node | None:
        """The backing file as it is now: jobs exchange it."""
        return None if self.disk is None else self.disk.backing

    def check_usable(self) -> None:
        """Raises StorageError for a corrupt image, ImageUnsupported for one that is refused."""
        self.corruption.check()
        if self.refusal is not None:
            raise ImageUnsupported(self.refusal, format="qcow2", structure="header")

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
        return self._locate(requests, COMPRESSED | ZERO_FLAG, 0)

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        places = self._locate(requests, WRITABLE, COPIED)
        if places is not None:
            occupied, bits = self.overlap.occupied, self.cluster_bits
            for place in places:
                if place >> bits in occupied:
                    self.overlap.check(place, 1)
        return places

    def _locate(
        self, requests: Sequence[WriteRequest], mask: int, wanted: int
    ) -> list[int] | None:
        """Host offsets of requests that lie in one cluster each, whose entry has of the bits of
        ``mask`` exactly ``wanted``; -1 for others and where the table is not cached."""
        if self.corruption.marked or self.refusal:
            self.check_usable()
        if self.encryption is not None:
            return None
        tables = self.tables
        l1, cached = tables.l1, tables.cache.find
        bits, l2_bits, slices, within_slice = tables.geometry
        unit = self.unit
        low = unit - 1
        mask |= low
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

    def resolve(self, offset: int, length: int) -> list[Extent]:
        self.check_usable()
        bits = self.cluster_bits
        first = offset >> bits
        count = ((offset + length - 1) >> bits) - first + 1 if length else 0
        end = offset + length
        extents: list[Extent] = []
        for cluster, kind, host, clusters, entry in self.runs(first, count):
            start = max(cluster << bits, offset)
            stop = min((cluster + clusters) << bits, end)
            if kind is Kind.ENCODED:
                extents.append(self._encoded(cluster << bits, start, stop, entry))
                continue
            if host >= 0:
                host += start - (cluster << bits)
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
            unit_length=self.unit,
        )

    def runs(self, first: int, count: int) -> Iterator[tuple[int, Kind, int, int, int]]:
        """(guest cluster, kind, host offset or -1, clusters, first entry) of runs of clusters.

        Neighbours may be of one kind all the same. Raises ImageCorrupt.
        """
        unit = self.unit
        for start, part, entries in self.tables.walk(first, count):
            if entries is None:
                yield start, Kind.BELOW, -1, part, 0
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
                    yield run, kind, host, cluster - run, opening
                run, opening = cluster, entry
                kind, host = self.classify(cluster, entry)
                cluster += 1
                if kind is Kind.ENCODED:
                    yield run, kind, host, 1, entry
                    run = cluster
                    expected = -1
                else:
                    step = unit if host >= 0 else 0
                    expected = entry + step
            if cluster > run:
                yield run, kind, host, cluster - run, opening

    def classify(self, cluster: int, entry: int) -> tuple[Kind, int]:
        """Kind and host offset (-1: none) of an L2 entry."""
        if entry & COMPRESSED:
            return Kind.ENCODED, -1
        host = entry & OFFSET_MASK
        if entry & ZERO_FLAG:
            if self.header.version < 3:
                raise self._bad_entry("Zero cluster entry found in pre-v3 image", cluster)
            if not host:
                return Kind.ZERO, -1
            if host & (self.unit - 1):
                raise self._bad_entry(f"Cluster allocation offset {c_hex(host)} unaligned", cluster)
            return Kind.ZERO, host
        if not host:
            return Kind.BELOW, -1
        if host & (self.unit - 1):
            raise self._bad_entry(f"Cluster allocation offset {c_hex(host)} unaligned", cluster)
        return Kind.DATA, host

    def _bad_entry(self, message: str, cluster: int) -> LaminaError:
        tables = self.tables
        table = tables.table_offset(cluster >> tables.l2_bits)
        index = cluster & (tables.l2_entries - 1)
        return self.corruption.found(
            f"{message} (L2 offset: {c_hex(table)}, L2 index: {c_hex(index)})",
            structure="L2 table",
            offset=table + index * 8,
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
        return zero(self, offset >> self.cluster_bits, length >> self.cluster_bits, may_unmap)

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
        from lamina.formats.qcow2.about import describe, describe_bitmaps

        assert self.disk is not None
        entries = self.bitmaps.entries if self.has_bitmaps else ()
        return describe(self.disk, self.header, self.snapshots, describe_bitmaps(entries))

    def before_first_write(self) -> None:
        from lamina.formats.qcow2.header import open_for_changes

        self.check_usable()
        open_for_changes(self)
        if self.has_bitmaps:
            self.bitmaps.before_first_write()

    def flush(self) -> None:
        if not self.corruption.marked:
            self.metadata.commit()

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

