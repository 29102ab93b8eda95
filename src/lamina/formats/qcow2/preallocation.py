"""Giving guest clusters their places before anybody writes to them."""

from __future__ import annotations

from array import array

from lamina.errors import StorageError
from lamina.formats.qcow2.writing import entry_run
from lamina.hints import TYPE_CHECKING
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def preallocate(mapping: Qcow2Mapping, start: int, end: int, first_host: int) -> None:
    """Map the unallocated clusters between the guest offsets ``start`` and ``end`` to host clusters
    at ``first_host`` and behind it, where the file holds zeroes or ends.

    Subclusters stay unallocated, so that a backing file still shows. The image file is made long
    enough before any table names what is new in it.
    """
    bits, tables, space = mapping.cluster_bits, mapping.tables, mapping.space
    cluster = start >> bits
    last = -(-end // mapping.cluster_size)
    with mapping.allocator.starting_at(first_host):
        while cluster < last:
            stop = min(((cluster >> tables.l2_bits) + 1) << tables.l2_bits, last)
            tables.prepare(cluster)
            while cluster < stop:
                free = _unallocated(mapping, cluster, stop)
                if not free:
                    cluster += 1
                    continue
                host, free = space.allocate(cluster, free)
                bitmaps = array("Q", bytes(8 * free)) if mapping.header.extended_l2 else None
                length = min(free << bits, round_up(end, mapping.unit) - (cluster << bits))
                try:
                    if not space.external:
                        _extend_file(mapping, host + length)
                    entries = entry_run(host, free, mapping.cluster_size, bitmaps)
                    tables.store(cluster, entries)
                except BaseException:
                    space.cancel(host, free)
                    raise
                cluster += free
            mapping.metadata.relieve()


def _unallocated(mapping: Qcow2Mapping, first: int, end: int) -> int:
    """How many clusters from ``first`` on have no place yet."""
    count = 0
    words = mapping.tables.entry_words
    for _, part, entries in mapping.tables.walk(first, end - first):
        if entries is None or not any(entries):
            count += part
            continue
        for at in range(0, len(entries), words):
            if any(entries[at : at + words]):
                return count
            count += 1
    return count


def clusters_needed(header: Header, guest_clusters: int, reftable_clusters: int = 1) -> int:
    """Host clusters of a new image with the header's parameters: header, refcounts, L1 table, L2
    tables and ``guest_clusters`` data clusters, which may lie in a data file."""
    unit = header.cluster_size
    l1 = -(-header.l1_entries_needed * 8 // unit)
    l2 = -(-guest_clusters // header.l2_entries)
    data = 0 if header.has_data_file else guest_clusters
    return with_refcounts(header, 1 + l1 + l2 + data, reftable_clusters)[0]


def with_refcounts(
    header: Header, clusters: int, reftable_clusters: int = 1
) -> tuple[int, int, int]:
    """(all clusters, refcount blocks, refcount table clusters) once those are counted that count
    ``clusters`` others and themselves."""
    per_block = header.cluster_size * 8 // header.refcount_bits
    blocks, table = 1, reftable_clusters
    while True:
        total = clusters + blocks + table
        blocks_needed = -(-total // per_block)
        table_needed = max(table, -(-blocks_needed * 8 // header.cluster_size))
        if (blocks_needed, table_needed) == (blocks, table):
            return total, blocks, table
        blocks, table = max(blocks, blocks_needed), table_needed


def _extend_file(mapping: Qcow2Mapping, end: int) -> None:
    """Make the file reach ``end``: what is mapped must be there, and before it is."""
    file = mapping.file
    if file.size < end:
        file.truncate(end, exact=False)
        if file.size < end:
            raise StorageError("The file could not be extended")
        mapping.metadata.data_written(file)


def end_of_file(mapping: Qcow2Mapping) -> int:
    """The first cluster boundary behind everything that was ever written."""
    return round_up(mapping.file.size, mapping.cluster_size)
