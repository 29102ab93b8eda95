"""The active mapping: the L1 table, held whole, and L2 tables, cached in slices.

Changes of L2 entries belong to the stage TABLES, changes of L1 entries to ROOTS; see
``engine.metadata``.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator

from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import StorageError
from lamina.formats.qcow2.allocation import Allocator, Freed
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import COPIED, MAX_L1, OFFSET_MASK
from lamina.formats.qcow2.overlap import Structure
from lamina.formats.qcow2.refcounts import from_big_endian, read_table, to_big_endian
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.corruption import Corruption
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.overlap import Overlap


class Tables:
    """Guest clusters to L2 entries and back. Guest clusters are numbered from 0.

    Entries are arrays of words: one word for each cluster, or two with extended L2 entries.
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        metadata: Metadata,
        overlap: Overlap,
        corruption: Corruption,
        allocator: Callable[[], Allocator],
        *,
        cache_bytes: int,
        slice_bytes: int,
    ) -> None:
        """``allocator`` is asked for when something is written for the first time."""
        self.file = file
        self.header = header
        self.metadata = metadata
        self.overlap = overlap
        self.corruption = corruption
        self.allocator = allocator
        self.cluster_bits = header.cluster_bits
        self.cluster_mask = header.cluster_size - 1
        self.l2_bits = header.l2_entries.bit_length() - 1
        self.l2_entries = header.l2_entries
        self.entry_size = header.l2_entry_size
        self.entry_words = self.entry_size // 8
        self.slice_bytes = slice_bytes
        self.slice_entries = slice_bytes // header.l2_entry_size
        self.slice_bits = self.slice_entries.bit_length() - 1
        slice_mask = self.slice_entries - 1
        self.geometry = (
            self.cluster_bits,
            self.l2_bits,
            self.l2_entries - 1 & ~slice_mask,
            slice_mask,
        )
        """For the quick way: bits of an offset in a cluster, bits of a cluster's number in an L2
        table, which of those choose the slice, which the entry in it."""
        self.l1 = read_table(file, header.l1_table_offset, header.l1_size)
        self.cache = TableCache(
            metadata,
            table_bytes=slice_bytes,
            capacity=cache_bytes,
            stage=Stage.TABLES,
            name="L2 table cache",
            load_event="l2_load",
            store_event="l2_update",
        )

    # -- looking up ------------------------------------------------------------------------------

    def table_offset(self, l1_index: int) -> int:
        """Host offset of an L2 table; 0: there is none. Raises ImageCorrupt."""
        if l1_index >= len(self.l1):
            return 0
        offset = self.l1[l1_index] & OFFSET_MASK
        if offset & self.cluster_mask:
            raise self.corruption.found(
                f"L2 table offset {c_hex(offset)} unaligned (L1 index: {c_hex(l1_index)})",
                structure="L1 table",
                offset=self.header.l1_table_offset + l1_index * 8,
            )
        return offset

    def entry(self, cluster: int) -> int:
        """The first word of one L2 entry; 0 also where there is no table."""
        offset = self.table_offset(cluster >> self.l2_bits)
        if not offset:
            return 0
        offset, place = self._slice(offset, cluster)
        return int.from_bytes(self.cache.get(offset)[place : place + 8], "big")

    def _slice(self, table_offset: int, cluster: int) -> tuple[int, int]:
        """(host offset of the slice, byte in it) of the entry of a guest cluster."""
        index = cluster & (self.l2_entries - 1)
        number = index >> self.slice_bits
        return (
            table_offset + number * self.slice_bytes,
            (index - (number << self.slice_bits)) * self.entry_size,
        )

    def walk(self, first: int, count: int) -> Iterator[tuple[int, int, array[int] | None]]:
        """(guest cluster, clusters, entries) piece by piece; None: there is no L2 table."""
        end = first + count
        size = self.entry_size
        while first < end:
            l1_index = first >> self.l2_bits
            offset = self.table_offset(l1_index)
            if not offset:
                stop = min(self._next_table(l1_index + 1) << self.l2_bits, end)
                yield first, stop - first, None
                first = stop
                continue
            slice_offset, place = self._slice(offset, first)
            part = min(self.slice_entries - place // size, end - first)
            data = self.cache.get(slice_offset)
            yield first, part, from_big_endian(memoryview(data)[place : place + part * size])
            first += part

    def _next_table(self, l1_index: int) -> int:
        """Index of the first L1 entry from ``l1_index`` on that is in use."""
        l1 = self.l1
        total = len(l1)
        while l1_index < total and not l1[l1_index]:
            l1_index += 1
        return l1_index if l1_index < total else 1 << 62

    # -- changing --------------------------------------------------------------------------------

    def prepare(self, cluster: int) -> None:
        """Make the L2 table of a guest cluster one that may be changed: it exists and is ours."""
        l1_index = cluster >> self.l2_bits
        if l1_index >= len(self.l1):
            self.grow_l1(l1_index + 1)
        entry = self.l1[l1_index]
        if entry & COPIED:
            self.overlap.check_table(self.table_offset(l1_index), Structure.ACTIVE_L2)
            return
        old = self.table_offset(l1_index)
        allocator = self.allocator()
        offset = allocator.allocate_table(1, "L2 table")
        if self.metadata.lazy_counts:
            # Few of these clusters carry the whole disk: whoever repairs it shall know of them.
            self.metadata.write_counts(even_lazy=True)
        try:
            content = self._whole_table(old) if old else bytearray(self.header.cluster_size)
            self.file.event("l2_alloc_write")
            # At once, so that the storage has room for it: a flush shall not be the first to see
            # that it has not, when everything that the table will carry is acknowledged.
            self.file.write(offset, content)
        except BaseException:
            allocator.cancel(offset, 1)
            raise
        for start in range(0, len(content), self.slice_bytes):
            self.cache.new(offset + start, content[start : start + self.slice_bytes])
        self.overlap.add_l2_table(offset)
        self._set_l1(l1_index, offset | COPIED)
        if old:
            allocator.free_later([Freed(old >> self.cluster_bits, 1)])

    def _whole_table(self, offset: int) -> bytearray:
        """A table that a snapshot shares, to be copied."""
        self.file.event("l2_alloc_cow_read")
        content = bytearray()
        for start in range(0, self.header.cluster_size, self.slice_bytes):
            content += self.cache.get(offset + start)
        return content

    def _set_l1(self, l1_index: int, entry: int) -> None:
        self.l1[l1_index] = entry
        self.metadata.put(
            Stage.ROOTS,
            self.header.l1_table_offset + l1_index * 8,
            entry.to_bytes(8, "big"),
            event="l1_update",
        )

    def unhook(self, l1_index: int) -> None:
        """The L1 table does not name this L2 table any more."""
        self._set_l1(l1_index, 0)

    def store(self, first: int, entries: array[int]) -> None:
        """Set the entries of guest clusters from ``first`` on; their tables are prepared."""
        done = 0
        while done < len(entries):
            cluster = first + done // self.entry_words
            offset = self.table_offset(cluster >> self.l2_bits)
            slice_offset, place = self._slice(offset, cluster)
            part = min((self.slice_bytes - place) // 8, len(entries) - done)
            data = to_big_endian(entries[done : done + part])
            self.cache.update(slice_offset, place, data)
            done += part

    # -- the L1 table ----------------------------------------------------------------------------

    def grow_l1(self, entries: int, *, exactly: bool = False) -> None:
        """Make the L1 table at least this long; a little longer still unless ``exactly``."""
        old_entries = len(self.l1)
        if entries <= old_entries:
            return
        if not exactly:
            # Grow by half each time, so that VM state does not move the table again and again.
            longer = max(old_entries, 1)
            while longer < entries:
                longer = longer * 3 // 2 + 1
            entries = longer
        if entries * 8 > MAX_L1:
            raise StorageError.from_errno(errno.EFBIG)
        allocator = self.allocator()
        header = self.header
        old_offset = header.l1_table_offset
        self.file.event("l1_grow_alloc_table")
        clusters = -(-entries * 8 // header.cluster_size)
        offset = allocator.allocate_table(clusters, "L1 table")
        self.l1.extend([0] * (entries - old_entries))
        header.l1_table_offset = offset
        header.l1_size = entries
        self.metadata.forget(old_offset, old_entries * 8)
        self.metadata.put(
            Stage.TABLES, offset, to_big_endian(self.l1), event="l1_grow_write_table"
        )
        self.put_l1_place("l1_grow_activate_table")
        self.overlap.add_l1_table()
        if old_entries:
            allocator.free_later(
                [Freed(old_offset >> self.cluster_bits, self._clusters_of(old_entries))]
            )

    def put_l1_place(self, event: str = "") -> None:
        """Have the header name the L1 table where it is: size and offset in one write."""
        header = self.header
        data = header.l1_size.to_bytes(4, "big") + header.l1_table_offset.to_bytes(8, "big")
        self.metadata.put(Stage.ROOTS, 36, data, event=event)

    def _clusters_of(self, l1_entries: int) -> int:
        return -(-l1_entries * 8 // self.header.cluster_size)
