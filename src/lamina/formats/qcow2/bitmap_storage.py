"""Reading and writing persistent bitmaps: the directory, and the table and the bits of each.

Clusters are written in place where they hold nothing but these bits. That is safe because the
directory says meanwhile that the bitmap is in use: after a crash nobody relies on it.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lamina.block.bitset import CHUNK_BYTES
from lamina.engine.metadata import Stage
from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.allocation import Freed
from lamina.formats.qcow2.bitmap_layout import (
    IN_USE,
    TABLE_ALL_ONES,
    TABLE_OFFSET_MASK,
    BitmapEntry,
    check_entry,
    check_loadable,
    check_table,
    parse_directory,
    table_entries,
)
from lamina.formats.qcow2.layout import MAX_OFFSET
from lamina.formats.qcow2.refcounts import read_table, to_big_endian

if TYPE_CHECKING:
    from lamina.block.bitset import Bitset
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import BitmapsExtension, Header
    from lamina.formats.qcow2.mapping import Qcow2Mapping

BATCH = 4 << 20
"""Bytes of bits that are read or written at once."""


# -- reading -------------------------------------------------------------------------------------


def read_directory(file: Node, extension: BitmapsExtension) -> Iterator[BitmapEntry]:
    """The entries as they are. Raises ImageCorrupt, ImageUnsupported where there is none."""
    offset, size = extension.directory_offset, extension.directory_size
    if offset + size > MAX_OFFSET:
        raise _error("Failed to read bitmap directory: Input/output error", errno.EIO)
    there = min(size, max(file.size - offset, 0))
    directory = (file.read(offset, there) if there else b"").ljust(size, b"\0")
    return parse_directory(directory, extension.count)


def read_bitmaps(file: Node, header: Header) -> list[BitmapEntry]:
    """The entries of the directory, if they and their tables keep the rules.

    What bitmaps in use hold is nobody's business. Raises ImageCorrupt, ImageUnsupported, in QEMU's
    words.
    """
    assert header.bitmaps is not None
    entries = []
    for index, entry in enumerate(read_directory(file, header.bitmaps)):
        check_entry(entry, index, header)
        entries.append(entry)
    names: set[str] = set()
    for index, entry in enumerate(entries):
        if not entry.flags & IN_USE:
            check_loadable(entry, index, header)
        if entry.name in names:
            raise _error(f"Bitmap already exists: {entry.name}", errno.EINVAL)
        names.add(entry.name)
    consistent = [entry for entry in entries if not entry.flags & IN_USE]
    # A small file can describe very large bitmaps only by naming the same place again and again.
    if sum(entry.table_size * 8 for entry in consistent) > file.size:
        raise _error("Bitmap tables are larger than the image file", errno.EINVAL)
    clusters = 0
    for entry in consistent:
        table = read_table(file, entry.table_offset, entry.table_size)
        check_table(table, entry, header)
        clusters += len(table) - table.count(0) - table.count(TABLE_ALL_ONES)
    if clusters * header.cluster_size > file.size + header.cluster_size:
        raise _error("Bitmap tables name more clusters than the image file has", errno.EINVAL)
    return entries


def load_bits(file: Node, header: Header, entry: BitmapEntry, bits: Bitset) -> None:
    """Put what the file has of a bitmap into ``bits``. Raises ImageCorrupt, StorageError."""
    table = read_table(file, entry.table_offset, entry.table_size)
    check_table(table, entry, header)
    unit = header.cluster_size
    clusters: list[tuple[int, int]] = []
    for index, word in enumerate(table):
        if word == TABLE_ALL_ONES:
            bits.load_ones(index * unit, unit)
        elif word:
            clusters.append((index, word & TABLE_OFFSET_MASK))
    step = max(BATCH // unit, 1)
    for start in range(0, len(clusters), step):
        part = clusters[start : start + step]
        buffer = bytearray(len(part) * unit)
        view = memoryview(buffer)
        requests = []
        for number, (_, host) in enumerate(part):
            # What lies behind the end of the file reads as zeroes.
            there = min(unit, max(file.size - host, 0))
            if there:
                requests.append((host, view[number * unit :][:there]))
        file.readv(requests)
        for number, (index, _) in enumerate(part):
            bits.load(index * unit, view[number * unit : (number + 1) * unit])


# -- writing -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Where a bitmap went."""

    offset: int
    size: int
    """Entries."""
    freed: list[Freed]
    """What held the bitmap before, to be given back once the directory names ``offset``."""


def store_bits(
    mapping: Qcow2Mapping, entry: BitmapEntry | None, granularity: int, bits: Bitset
) -> Table:
    """Write those of ``bits`` that changed, and have the table written that names them.

    ``entry``: where the bitmap is now; None: nowhere. If this raises, nothing was taken and no
    table changes. Raises ImageCorrupt, StorageError.
    """
    header, unit = mapping.header, mapping.header.cluster_size
    old = array("Q")
    if entry is not None:
        old = read_table(mapping.file, entry.table_offset, entry.table_size)
        check_table(old, entry, header)
    size = table_entries(header, granularity)
    table = old[:size]
    table.extend([0] * (size - len(table)))
    in_place: list[tuple[int, int]] = []
    elsewhere: list[int] = []
    for index in _changed_clusters(bits, unit, size):
        table[index] = _summary(bits.read(index * unit, unit))
        if table[index] != _MIXED:
            continue
        host = old[index] & TABLE_OFFSET_MASK if index < len(old) else 0
        if host and mapping.refcounts.get(host >> header.cluster_bits) == 1:
            mapping.overlap.check(host, unit)
            in_place.append((index, host))
            table[index] = host
        else:
            elsewhere.append(index)
    place = 0
    if entry is not None and len(old) == size and _is_ours(mapping, entry):
        place = entry.table_offset
    taken: list[tuple[int, int]] = []
    try:
        if elsewhere:
            host = mapping.allocator.allocate(len(elsewhere), "bitmap data")
            taken.append((host, len(elsewhere)))
            for number, index in enumerate(elsewhere):
                table[index] = host + number * unit
        if not place:
            clusters = -(-size * 8 // unit)
            place = mapping.allocator.allocate_table(clusters, "bitmap table")
            taken.append((place, clusters))
        written = in_place + [(index, table[index]) for index in elsewhere]
        _write_clusters(mapping, bits, sorted(written))
    except BaseException:
        for host, clusters in taken:
            mapping.allocator.cancel(host, clusters)
        raise
    stays = entry is not None and place == entry.table_offset
    _put_table(mapping, place, table, old if stays else None)
    left = [
        word for index, word in enumerate(old) if index >= size or table[index] != word
    ]
    freed = [Freed(word >> header.cluster_bits, 1) for word in left if word & TABLE_OFFSET_MASK]
    if entry is not None and not stays:
        freed.append(_table_run(header, entry))
    return Table(place, size, freed)


def _is_ours(mapping: Qcow2Mapping, entry: BitmapEntry) -> bool:
    """The table lies in clusters that are counted, once each: it may be written in place."""
    run = _table_run(mapping.header, entry)
    clusters = range(run.first, run.first + run.clusters)
    return all(mapping.refcounts.get(cluster) == 1 for cluster in clusters)


_MIXED = 2
"""Not the word of any table: some bits of the cluster are set."""


def _summary(data: bytes) -> int:
    """The word of a table that says what the bits of a cluster are; ``_MIXED`` if none does."""
    zeroes = data.count(0)
    if zeroes == len(data):
        return 0
    return TABLE_ALL_ONES if not zeroes and data.count(0xFF) == len(data) else _MIXED


def _changed_clusters(bits: Bitset, unit: int, size: int) -> list[int]:
    """Which clusters of the bitmap hold bits that changed."""
    clusters: set[int] = set()
    for number in bits.changed:
        first = number * CHUNK_BYTES // unit
        last = ((number + 1) * CHUNK_BYTES - 1) // unit
        clusters.update(range(first, min(last + 1, size)))
    return sorted(clusters)


def _write_clusters(
    mapping: Qcow2Mapping, bits: Bitset, clusters: list[tuple[int, int]]
) -> None:
    """Write the bits of clusters of the bitmap, given as (number, host offset)."""
    unit = mapping.header.cluster_size
    step = max(BATCH // unit, 1)
    for start in range(0, len(clusters), step):
        part = clusters[start : start + step]
        mapping.file.writev([(host, bits.read(index * unit, unit)) for index, host in part])
        mapping.metadata.data_written(mapping.file)


def _put_table(
    mapping: Qcow2Mapping, place: int, table: array[int], old: array[int] | None
) -> None:
    """Have the table written, or what differs from ``old``, which is there already."""
    first, end = 0, len(table)
    if old is not None:
        changed = [index for index in range(len(table)) if table[index] != old[index]]
        if not changed:
            return
        first, end = changed[0], changed[-1] + 1
        mapping.overlap.check(place + first * 8, (end - first) * 8)
    mapping.metadata.put(Stage.TABLES, place + first * 8, to_big_endian(table[first:end]))


def clusters_of(mapping: Qcow2Mapping, entry: BitmapEntry) -> list[Freed]:
    """What is free once the directory does not name this bitmap any more."""
    header = mapping.header
    table = read_table(mapping.file, entry.table_offset, entry.table_size)
    try:
        check_table(table, entry, header)
    except ImageCorrupt:
        # Rather leaks than somebody else's clusters.
        return []
    words = (word & TABLE_OFFSET_MASK for word in table)
    runs = [Freed(word >> header.cluster_bits, 1) for word in words if word]
    return [*runs, _table_run(header, entry)]


def _table_run(header: Header, entry: BitmapEntry) -> Freed:
    clusters = -(-entry.table_size * 8 // header.cluster_size)
    return Freed(entry.table_offset >> header.cluster_bits, clusters)


def _error(message: str, number: int) -> ImageCorrupt:
    return ImageCorrupt(message, format="qcow2", structure="bitmap directory", errno=number)
