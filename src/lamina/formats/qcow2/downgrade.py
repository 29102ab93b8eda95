"""From version 3 to version 2: what the older one cannot say must go.

Version 2 knows no zero clusters. In every L2 table, of the disk and of its snapshots, such an entry
becomes a cluster that holds zeroes or, where nothing lies below, an unallocated one. To readers of
either version the disk is the same at every moment: new clusters are counted and filled before
entries name them, and freed when none does. Then one header is exchanged for the other.

A table that several L1 tables share is changed once, for all of them; what it names counts as often
as the table does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lamina.errors import ImageCorrupt, LaminaError, Refused, StorageError
from lamina.formats.qcow2.allocation import Freed
from lamina.formats.qcow2.arrays import Indices, Words, read_tables, read_words
from lamina.formats.qcow2.corruption import c_hex
from lamina.formats.qcow2.header import rewrite
from lamina.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE,
    INCOMPAT_DIRTY,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    V2_LENGTH,
    ZERO_FLAG,
)
from lamina.formats.qcow2.overlap import Structure
from lamina.formats.qcow2.snapshots import check_l1
from lamina.formats.qcow2.stored import StoredCounts
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.units import MIB

if TYPE_CHECKING:
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.mapping import Qcow2Mapping

_ZERO = np.uint64(ZERO_FLAG)
_COMPRESSED = np.uint64(COMPRESSED)
_OFFSET = np.uint64(OFFSET_MASK)


def check_features(header: Header) -> None:
    """Raises Refused if the image uses features that version 2 has no words for."""
    if header.incompatible_features & INCOMPAT_DATA_FILE:
        raise Refused("Cannot downgrade an image with a data file")
    rest = header.incompatible_features & ~(INCOMPAT_DIRTY | INCOMPAT_COMPRESSION)
    if rest:
        raise Refused(f"Cannot downgrade an image with incompatible features {rest:#x} set")


def _check_content(mapping: Qcow2Mapping) -> None:
    """The same for what is in it."""
    header = mapping.header
    if any(one.disk_size not in (None, header.size) for one in mapping.snapshots):
        raise Refused("Internal snapshots prevent downgrade of image")
    if header.compression_type and _has_compressed(mapping):
        raise Refused(
            f"Cannot downgrade an image with {header.compression_name} compression type and "
            "existing compressed clusters"
        )


def downgrade(mapping: Qcow2Mapping, progress: Callable[[float], None]) -> None:
    """Turn the image into one of version 2. Durable on return. Raises Refused if it cannot be."""
    metadata, header = mapping.metadata, mapping.header
    check_features(header)
    metadata.lazy_counts = False
    metadata.commit(counts=True)
    metadata.barrier()
    _check_content(mapping)
    if mapping.has_bitmaps:
        mapping.bitmaps.remove_all()
    try:
        expand_zero_clusters(mapping, progress)
    except LaminaError as error:
        raise StorageError.from_errno(error.errno).in_context(
            "Failed to turn zero into data clusters: "
        ) from error
    metadata.commit(counts=True)
    metadata.barrier()
    header.version = 2
    header.header_length = V2_LENGTH
    header.incompatible_features = header.compatible_features = header.autoclear_features = 0
    header.compression_type = 0
    header.unknown_tail = b""
    rewrite(mapping)
    mapping.codec = header.compression_name


# -- all tables ------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """An L2 table, wherever it is used."""

    offset: int
    first_cluster: int
    """The guest cluster of its first entry."""
    references: int
    """How many L1 entries name it."""
    active: bool
    """The disk itself is among those."""


class _Trees:
    """The L2 tables of the disk and of all snapshots, in the order of the L1 entries."""

    def __init__(self, mapping: Qcow2Mapping) -> None:
        """Raises ImageCorrupt."""
        header = mapping.header
        places = [(header.l1_table_offset, header.l1_size)]
        for snapshot in mapping.snapshots:
            check_l1(snapshot, header)
            places.append((snapshot.l1_table_offset, snapshot.l1_size))
        l1_tables = [read_words(mapping.file, *place) & _OFFSET for place in places]
        entries = np.concatenate(l1_tables)
        self.l1_entries = len(entries)
        """Of all L1 tables together."""
        used = np.flatnonzero(entries)
        low = np.uint64(mapping.cluster_size - 1)
        for entry in entries[used][entries[used] & low != 0].tolist():
            raise mapping.corruption.found(
                f"L2 table offset {c_hex(entry)} unaligned", structure="L1 table"
            )
        offsets, first, counts = np.unique(entries[used], return_index=True, return_counts=True)
        order = np.argsort(first)
        self.positions = used[first[order]].tolist()
        """For each table: the index of the first L1 entry that names it."""
        index_in_l1 = np.concatenate([np.arange(len(table)) for table in l1_tables])
        bits = mapping.tables.l2_bits
        active = len(l1_tables[0])
        self.tables = [
            _Table(offset, int(index_in_l1[position]) << bits, count, position < active)
            for offset, count, position in zip(
                offsets[order].tolist(), counts[order].tolist(), self.positions, strict=True
            )
        ]


def _entries(
    mapping: Qcow2Mapping, tables: list[_Table]
) -> Iterator[tuple[int, Words]]:
    """(index of the first table, entries of it and its successors) in large pieces."""
    offsets = np.array([table.offset for table in tables], dtype=np.int64)
    for run in read_tables(mapping.file, offsets, mapping.cluster_size):
        yield run.first, run.entries


def _has_compressed(mapping: Qcow2Mapping) -> bool:
    return any(
        bool((entries & _COMPRESSED).any())
        for _, entries in _entries(mapping, _Trees(mapping).tables)
    )


# -- zero clusters ---------------------------------------------------------------------------------


def expand_zero_clusters(mapping: Qcow2Mapping, progress: Callable[[float], None]) -> None:
    """No L2 table has zero clusters any more. Nothing of the metadata is held back in memory when
    this begins."""
    header = mapping.header
    entries = header.refcount_table_clusters << (header.cluster_bits - 3)
    block_table = read_words(mapping.file, header.refcount_table_offset, entries)
    counts = StoredCounts(mapping.file, header, block_table & np.uint64(REFTABLE_OFFSET_MASK))
    trees = _Trees(mapping)
    done = _Steps(progress, trees.l1_entries)
    for first, run in _entries(mapping, trees.tables):
        zero = ((run & _ZERO) != 0) & ((run & _COMPRESSED) == 0)
        for row in range(len(run)):
            done.up_to(trees.positions[first + row])
            if zero[row].any():
                table = trees.tables[first + row]
                _expand(mapping, table, run[row], np.flatnonzero(zero[row]), counts)
                mapping.metadata.relieve()
    done.up_to(trees.l1_entries)


class _Steps:
    """Progress by L1 entries, those without a table included."""

    def __init__(self, progress: Callable[[float], None], total: int) -> None:
        self._progress = progress
        self._total = total
        self._step = max(total // 256, 1)
        self._shown = 0

    def up_to(self, done: int) -> None:
        for shown in range(self._shown + self._step, done + 1, self._step):
            self._progress(shown / self._total)
            self._shown = shown


def _expand(
    mapping: Qcow2Mapping, table: _Table, entries: Words, zero: Indices, counts: StoredCounts
) -> None:
    """Replace the zero clusters of one table, which are its entries ``zero``."""
    hosts = (entries[zero] & _OFFSET).astype(np.int64)
    unaligned = np.flatnonzero(hosts & (mapping.cluster_size - 1))
    if len(unaligned):
        raise ImageCorrupt(
            f"Cluster allocation offset {c_hex(int(hosts[unaligned[0]]))} unaligned",
            path=mapping.file.filename,
            format="qcow2",
            structure="L2 table",
            offset=table.offset + 8 * int(zero[unaligned[0]]),
        )
    # Reserved places that nobody but this table names hold the zeroes from now on.
    kept = hosts != 0
    kept[kept] = counts.get(hosts[kept] >> mapping.cluster_bits) == table.references
    new = np.where(kept, hosts, 0)
    for place, index in zip(hosts[kept].tolist(), zero[kept].tolist(), strict=True):
        _fill(mapping, table.first_cluster + index, place, 1)
    if _shines_through(mapping):
        new[~kept] = _allocate(mapping, table, zero[~kept])
    flag = COPIED if table.active and table.references == 1 else 0
    words = new.astype(np.uint64)
    words[new != 0] |= np.uint64(flag)
    changed = entries.copy()
    changed[zero] = words
    _store(mapping, table, entries, changed)
    freed = np.sort(hosts[~kept & (hosts != 0)]) >> mapping.cluster_bits
    runs = [Freed(first, 1) for first in freed.tolist()]
    for _ in range(table.references):
        mapping.allocator.free_later(runs)


def _shines_through(mapping: Qcow2Mapping) -> bool:
    """Whether an unallocated cluster may read as something else than zeroes."""
    return mapping.header.backing_file is not None or mapping.backing() is not None


def _allocate(mapping: Qcow2Mapping, table: _Table, indices: Indices) -> Indices:
    """New clusters of zeroes for these entries of the table, counted as often as it is."""
    count = len(indices)
    if not count:
        return indices
    allocator = mapping.allocator
    host = allocator.allocate(count)
    try:
        start = 0
        for stop in [*(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), count]:
            first = table.first_cluster + int(indices[start])
            _fill(mapping, first, host + start * mapping.cluster_size, stop - start)
            start = stop
        if table.references > 1:
            mapping.refcounts.add(host >> mapping.cluster_bits, count, table.references - 1)
    except BaseException:
        allocator.cancel(host, count)
        raise
    unit = mapping.cluster_size
    return np.arange(host, host + count * unit, unit, dtype=np.int64)


def _fill(mapping: Qcow2Mapping, cluster: int, host_offset: int, count: int) -> None:
    """Have host clusters hold what reads as zeroes at these guest clusters."""
    file, encryption, length = mapping.file, mapping.encryption, count * mapping.cluster_size
    mapping.overlap.check(host_offset, length)
    mapping.space.needed(host_offset, count)
    if encryption is None:
        file.write_zeroes(host_offset, length)
    else:
        guest_offset = cluster * mapping.cluster_size
        for start in range(0, length, MIB):
            data = memoryview(bytearray(min(MIB, length - start)))
            sector = encryption.sector(guest_offset + start, host_offset + start)
            encryption.cipher.encrypt(data, sector)
            file.write(host_offset + start, data)
    mapping.metadata.data_written(file)


def _store(mapping: Qcow2Mapping, table: _Table, before: Words, after: Words) -> None:
    """Change the parts of the table that differ."""
    tables = mapping.tables
    mapping.overlap.check_table(table.offset, Structure.ACTIVE_L2 | Structure.INACTIVE_L2)
    size = tables.slice_entries
    for start in range(0, len(after), size):
        part = slice(start, start + size)
        if not np.array_equal(before[part], after[part]):
            data = after[part].astype(">u8").tobytes()
            tables.cache.update(table.offset + start * 8, 0, data)
