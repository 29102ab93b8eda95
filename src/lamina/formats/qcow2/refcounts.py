"""Reference counts of host clusters: the refcount table and its blocks.

The table is held whole (it is at most 8 MiB), blocks are cached. Counts that go up belong to the
stage COUNTS, those that go down to FREES; see ``engine.metadata``.
"""

from __future__ import annotations

import errno
import sys
from array import array

from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import StorageError
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.layout import REFTABLE_OFFSET_MASK
from lamina.formats.qcow2.overlap import Structure
from lamina.formats.qcow2.refblock import Width
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.corruption import Corruption
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.overlap import Overlap


class Refcounts:
    def __init__(
        self,
        file: Node,
        header: Header,
        metadata: Metadata,
        overlap: Overlap,
        corruption: Corruption,
        cache_bytes: int,
    ) -> None:
        self.file = file
        self.header = header
        self.metadata = metadata
        self.overlap = overlap
        self.corruption = corruption
        self._low = header.cluster_size - 1
        self._set_width()
        self.cache = TableCache(
            metadata,
            table_bytes=header.cluster_size,
            capacity=cache_bytes,
            stage=Stage.COUNTS,
            name="refcount block cache",
            store_event="refblock_update_part",
        )
        self._table: array[int] | None = None

    def _set_width(self) -> None:
        self.width = Width(self.header.refcount_order)
        self.per_block = self.width.entries(self.header.cluster_size)
        """Clusters that one block counts."""

    @property
    def table(self) -> array[int]:
        """Host offsets of the blocks; 0: all counts are zero."""
        if self._table is None:
            self._table = self._load_table()
        return self._table

    @table.setter
    def table(self, table: array[int]) -> None:
        self._table = table

    def _load_table(self) -> array[int]:
        header = self.header
        self.file.event("reftable_load")
        return read_table(
            self.file,
            header.refcount_table_offset,
            header.refcount_table_clusters << (header.cluster_bits - 3),
        )

    def reload(self) -> None:
        """The file was changed behind our back, or the header, which says how wide counts are."""
        self._set_width()
        self._table = None
        self.cache.drop_clean()

    def block_offset(self, index: int) -> int:
        """Host offset of the block; 0: there is none. Raises ImageCorrupt."""
        table = self.table
        if index >= len(table):
            return 0
        offset = table[index] & REFTABLE_OFFSET_MASK
        if offset & self._low:
            raise self.corruption.found(
                f"Refblock offset {c_hex(offset)} unaligned (reftable index: {c_hex(index)})",
                structure="refcount table",
                offset=self.header.refcount_table_offset + index * 8,
            )
        return offset

    def block(self, index: int) -> bytearray | None:
        """The block that counts the clusters from ``index * per_block`` on."""
        offset = self.block_offset(index)
        return self._load(offset) if offset else None

    def _load(self, offset: int) -> bytearray:
        block = self.cache.get(offset)
        self.file.event("refblock_load")
        return block

    def get(self, cluster: int) -> int:
        index, place = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else self.width.get(block, place)

    def uses_more_than(self, clusters: int) -> bool:
        """Whether more than so many clusters have references; counts no further than it must."""
        used = 0
        for index in range(len(self.table)):
            block = self.block(index)
            if block is not None:
                used += self.width.count_used(block)
                if used > clusters:
                    return True
        return False

    def add(self, first: int, count: int, references: int = 1) -> None:
        """So many references more to each of these clusters, whose blocks exist. All or none.

        Raises StorageError (EINVAL) where the width of the entries does not suffice.
        """
        changes = self._runs(first, count)
        for _, offset, _, _, value in changes:
            if not offset:
                raise StorageError("Clusters without a refcount block", errno=errno.EINVAL)
            if value > self.width.maximum - references:
                raise StorageError("Refcount overflow", errno=errno.EINVAL)
        self._apply(changes, references, Stage.COUNTS)

    def drop(self, first: int, count: int, stage: Stage = Stage.FREES) -> list[tuple[int, int]]:
        """One reference less; returns the runs (first, count) that are free now. All or none.

        Raises StorageError (EINVAL) where there was no reference.
        """
        changes = self._runs(first, count)
        for _, _, _, _, value in changes:
            if not value:
                raise StorageError("Invalid argument", errno=errno.EINVAL)
        self._apply(changes, -1, stage)
        return [(start, run) for start, _, _, run, value in changes if value == 1]

    def _runs(self, first: int, count: int) -> list[tuple[int, int, int, int, int]]:
        """(first cluster, host offset of the block, first entry, entries, value) of the runs of
        equal counts."""
        runs = []
        per_block = self.per_block
        while count:
            index, place = divmod(first, per_block)
            part = min(count, per_block - place)
            offset = self.block_offset(index)
            if offset:
                found = self.width.runs(self._load(offset), place, part)
                base = first - place
                runs += [(base + start, offset, start, run, value) for start, run, value in found]
            else:
                runs.append((first, 0, place, part, 0))
            first += part
            count -= part
        return runs

    def _apply(
        self, runs: list[tuple[int, int, int, int, int]], delta: int, stage: Stage
    ) -> None:
        for _, offset, place, count, value in runs:
            self.overlap.check_table(offset, Structure.REFCOUNT_BLOCK)
            self.width.fill(self.cache.get(offset), place, count, value + delta)
            self.cache.dirty(offset, *self.width.changed(place, count), stage)


def read_table(file: Node, offset: int, entries: int) -> array[int]:
    """``entries`` big-endian 64-bit numbers; those behind the end of the file are zero."""
    data = bytearray(entries * 8)
    inside = min(len(data), max(0, file.size - offset))
    if inside:
        file.readv([(offset, memoryview(data)[:inside])])
    return from_big_endian(data)


def from_big_endian(data: bytes | bytearray | memoryview) -> array[int]:
    numbers = array("Q")
    numbers.frombytes(data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def to_big_endian(numbers: array[int]) -> bytes:
    if sys.byteorder == "little":
        numbers = array("Q", numbers)
        numbers.byteswap()
    return numbers.tobytes()
