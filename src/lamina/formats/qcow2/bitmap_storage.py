"""Reading and writing persistent bitmaps: the directory, and the table and the bits of each.

A bitmap that is stored goes to new clusters: what the directory names is never written to. Of a
large one, those clusters of bits that did not change stay.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator

from lamina.block.bitset import CHUNK_BYTES
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
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.block.bitset import Bitset
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.node import Node
    from lamina.formats.qcow2.extensions import BitmapsExtension
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.mapping import Qcow2Mapping

BATCH = 4 << 20
"""Bytes of bits that are read or written at once."""
LARGE = 4 << 20
"""Bytes of bits from which on it pays to leave alone what did not change."""


# -- reading -------------------------------------------------------------------------------------


def read_directory(file: Node, extension: BitmapsExtension) -> Iterator[BitmapEntry]:
    """The entries as they are. Raises ImageCorrupt, ImageUnsupported where there is none."""
    offset, size = extension.directory_offset, extension.directory_size
    if offset + size > MAX_OFFSET:
        raise _error("Failed to read bitmap directory: Input/output error", errno.EIO)
    there = min(size, max(file.size - offset, 0))
    directory = (file.read(offset, there) if there else b"").ljust(size, b"\0")
    return parse_directory(directory, extension.count)


def read_bitmaps(file: Node, header: Header, limit: int = MAX_OFFSET) -> list[BitmapEntry]:
    """The entries of the directory, if they and their tables keep the rules.

    Looks at no more than ``limit`` bytes of tables.

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
        limit -= entry.table_size * 8
        if limit < 0:
            break
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


class Stored(NamedTuple):
    """Where a bitmap went."""

    table_offset: int
    table_size: int
    """Entries."""
    taken: list[Freed]
    """What was allocated for it, to be cancelled should the directory not name it after all."""
    freed: list[Freed]
    """What held the bitmap before, to be given back once the directory names the new table."""
    chunks: set[int]
    """Those of its bits that had changed, and count as stored now."""


def store_bits(mapping: Qcow2Mapping, entry: BitmapEntry | None, dirty: DirtyBitmap) -> Stored:
    """Write a bitmap to new clusters, and a table that names them.

    ``entry``: where it is now; None: nowhere. If this raises, nothing was taken and nothing that
    the directory names has changed. Raises ImageCorrupt, StorageError.
    """
    header, unit = mapping.header, mapping.header.cluster_size
    size = table_entries(header, dirty.granularity)
    old = array("Q")
    if entry is not None:
        old = read_table(mapping.file, entry.table_offset, entry.table_size)
        check_table(old, entry, header)
    large = sum(map(_names_cluster, old)) * unit > LARGE
    table = array("Q", [0]) * size
    if large:
        table = old[:size] + table[len(old) :]
    taken: list[Freed] = []
    changed: set[int] = set()
    try:
        if not large or dirty.is_changed:
            with dirty.bits() as bits:
                chunks = bits.changed if large else bits.chunks
                _write_clusters(mapping, bits, _clusters(chunks, unit, size), table, taken)
                # What is marked from here on is news again.
                changed.update(bits.changed)
                bits.changed.clear()
        place = write_new(mapping, to_big_endian(table), "bitmap table", taken)
    except BaseException:
        dirty.not_stored(changed)
        cancel(mapping, taken)
        raise
    left = (word for index, word in enumerate(old) if index >= size or table[index] != word)
    freed = [Freed(word >> header.cluster_bits, 1) for word in left if _names_cluster(word)]
    if entry is not None:
        freed.append(_table_run(header, entry))
    return Stored(place, size, taken, freed, changed)


def _names_cluster(word: int) -> bool:
    return word & TABLE_OFFSET_MASK != 0


def _write_clusters(
    mapping: Qcow2Mapping,
    bits: Bitset,
    clusters: Iterable[int],
    table: array[int],
    taken: list[Freed],
) -> None:
    """Write these clusters of bits, and enter in ``table`` where they are."""
    unit = mapping.header.cluster_size
    writes: list[tuple[int, bytes]] = []
    for index in clusters:
        data = bits.read(index * unit, unit)
        table[index] = _summary(data)
        if table[index] != _MIXED:
            continue
        table[index] = host = _take(mapping, 1, "bitmap data", taken)
        writes.append((host, data))
        if len(writes) * unit >= BATCH:
            _write(mapping, writes)
    _write(mapping, writes)


def write_new(mapping: Qcow2Mapping, data: bytes, what: str, taken: list[Freed]) -> int:
    """Write a table, or a directory, to new clusters; their host offset."""
    place = _take(mapping, -(-len(data) >> mapping.header.cluster_bits), what, taken)
    _write(mapping, [(place, data)])
    return place


def _take(mapping: Qcow2Mapping, clusters: int, what: str, taken: list[Freed]) -> int:
    host = mapping.allocator.allocate_behind(clusters, what)
    taken.append(Freed(host >> mapping.header.cluster_bits, clusters))
    return host


def cancel(mapping: Qcow2Mapping, taken: Iterable[Freed]) -> None:
    """Give back what was taken, which nothing names. Never raises."""
    for run in taken:
        mapping.allocator.cancel(run.first << mapping.header.cluster_bits, run.clusters)


def _write(mapping: Qcow2Mapping, writes: list[tuple[int, bytes]]) -> None:
    if writes:
        mapping.file.writev(writes)
        mapping.metadata.data_written(mapping.file)
        writes.clear()


def _clusters(chunks: Iterable[int], unit: int, size: int) -> list[int]:
    """The clusters of a bitmap that hold these chunks of bits, in order."""
    clusters: set[int] = set()
    for number in chunks:
        first = number * CHUNK_BYTES // unit
        last = ((number + 1) * CHUNK_BYTES - 1) // unit
        clusters.update(range(first, min(last + 1, size)))
    return sorted(clusters)


_MIXED = 2
"""Not the word of any table: some bits of the cluster are set."""


def _summary(data: bytes) -> int:
    """The word of a table that says what the bits of a cluster are; ``_MIXED`` if none does."""
    zeroes = data.count(0)
    if zeroes == len(data):
        return 0
    return TABLE_ALL_ONES if not zeroes and data.count(0xFF) == len(data) else _MIXED


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
