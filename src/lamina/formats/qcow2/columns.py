"""The extents of a whole image as arrays: the same as ``Qcow2Mapping.resolve``, table by table.

Tables are read from the file in long runs, past the cache; what the cache holds unwritten is put in
its place. Wherever an entry breaks a rule, ``resolve`` is asked instead, which knows what to say.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lamina.block.extents import Columns, Kind
from lamina.formats.qcow2.arrays import (
    BATCH,
    Indices,
    TableRun,
    Words,
    compressed_places,
    read_tables,
    straight_tables,
)
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from lamina.formats.qcow2.subclusters import ALL, ALL_ZERO, SUBCLUSTER_BITS, SUBCLUSTERS
from lamina.hints import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping

_ROWS = 1 << 16
"""Rows of a piece, more or less."""


class _Rows(NamedTuple):
    """Rows without their lengths: each ends where the next one begins."""

    guest: Indices
    kind: npt.NDArray[np.uint8]
    host: Indices
    stored: Indices


def columns(mapping: Qcow2Mapping, offset: int, length: int) -> Iterator[Columns]:
    """Extents of this guest range in pieces of bounded size. Raises ImageCorrupt."""
    mapping.check_usable()
    held: list[_Rows] = []
    count, end = 0, offset + length
    for rows in _rows(mapping, offset, end):
        if count >= _ROWS:
            yield _joined(mapping, held, int(rows.guest[0]))
            held, count = [], 0
        held.append(rows)
        count += len(rows.guest)
    if held:
        yield _joined(mapping, held, end)


def _joined(mapping: Qcow2Mapping, held: list[_Rows], end: int) -> Columns:
    """All these rows, those joined that go on where the one before ends."""
    guest, kind, host, stored = (np.concatenate(column) for column in zip(*held, strict=True))
    length = np.diff(guest, append=end)
    expected = np.where(host[:-1] >= 0, host[:-1] + length[:-1], -1)
    begins = (kind[1:] != kind[:-1]) | (host[1:] != expected) | (kind[1:] == Kind.ENCODED)
    keep = np.append(True, begins)
    guest, host = guest[keep], host[keep]
    placed = (host >= 0).astype(np.uint8)
    return Columns(
        guest,
        np.diff(guest, append=end),
        kind[keep],
        host,
        stored[keep],
        placed,
        (None, mapping.data_node),
    )


def _rows(mapping: Qcow2Mapping, offset: int, end: int) -> Iterator[_Rows]:
    per_table = mapping.header.l2_entries << mapping.cluster_bits
    position = offset
    for first, places in _table_runs(mapping, offset // per_table, -(-end // per_table)):
        if position < first * per_table:
            yield _below(position)
        for run in read_tables(mapping.file, places, mapping.cluster_size):
            start = (first + run.first) * per_table
            position = min(start + len(run.offsets) * per_table, end)
            yield _rows_of_tables(
                mapping, run, first + run.first, max(start, offset), position
            )
    if position < end:
        yield _below(position)


def _table_runs(
    mapping: Qcow2Mapping, first: int, last: int
) -> Iterator[tuple[int, Indices]]:
    """(L1 index, host offsets of the L2 tables from there on): runs without long gaps.

    Offset 0: no table, in a short gap. What is left out has no tables.
    """
    l1 = np.array(mapping.tables.l1[first:last], dtype=np.uint64)
    places = (l1 & np.uint64(OFFSET_MASK)).view(np.int64)
    present = np.flatnonzero(places)
    if not len(present):
        return
    longest = max(BATCH >> mapping.cluster_bits, 1)
    gaps = np.flatnonzero(np.diff(present) > longest) + 1
    for part in np.split(present, gaps):
        low, high = int(part[0]), int(part[-1]) + 1
        yield first + low, places[low:high]


def _rows_of_tables(
    mapping: Qcow2Mapping, run: TableRun, l1_index: int, start: int, stop: int
) -> _Rows:
    """The guest range from ``start`` to ``stop``, which lies in the tables of ``run``."""
    if (run.offsets & (mapping.cluster_size - 1)).any():
        return _resolved(mapping, start, stop)
    if not mapping.read_only:
        _put_cached(mapping, run)
    header, bits = mapping.header, mapping.cluster_bits
    base = l1_index * header.l2_entries
    low, high = (start >> bits) - base, -(-stop >> bits) - base
    if header.extended_l2:
        rows = _extended_rows(mapping, run.entries, base, low, high)
    else:
        if straight_tables(run.entries, header, 1 << 62).all():
            numbers = np.arange(0, high, header.l2_entries)
            numbers = np.maximum(numbers[low // header.l2_entries :], low)
        else:
            numbers = np.arange(low, high)
        rows = _standard_rows(mapping, run.entries.reshape(-1)[numbers], numbers + base)
    if rows is None:
        return _resolved(mapping, start, stop)
    # The range may begin within a cluster.
    first = int(np.searchsorted(rows.guest, start, side="right")) - 1
    part = slice(first, int(np.searchsorted(rows.guest, stop)))
    rows = _Rows(rows.guest[part], rows.kind[part], rows.host[part], rows.stored[part])
    if rows.host[0] >= 0 and rows.kind[0] != Kind.ENCODED:
        rows.host[0] += start - int(rows.guest[0])
    rows.guest[0] = start
    return rows


def _standard_rows(mapping: Qcow2Mapping, entries: Words, clusters: Indices) -> _Rows | None:
    """One row for each of these entries of guest clusters; None if one of them breaks a rule."""
    bits = mapping.cluster_bits
    guest = clusters << bits
    host = (entries & np.uint64(OFFSET_MASK)).view(np.int64)
    # Reductions first: most images have neither compressed clusters nor zeroes.
    union = int(np.bitwise_or.reduce(entries))
    compressed = (entries & np.uint64(COMPRESSED)) != 0 if union & COMPRESSED else None
    zero = (entries & np.uint64(ZERO_FLAG)) != 0 if union & ZERO_FLAG else None
    low = mapping.cluster_size - 1
    bad = host & low != 0 if union & OFFSET_MASK & low else None
    if compressed is not None:
        # Such an entry has its bits to itself.
        zero = None if zero is None else zero & ~compressed
        bad = None if bad is None else bad & ~compressed
    placed = host != 0
    if mapping.space.external:
        copied = (entries & np.uint64(COPIED)) != 0
        placed |= copied if zero is None else copied & ~zero
        bad = placed & (host != guest)
        if compressed is not None:
            bad |= compressed
    if bad is not None and bad.any():
        return None
    kind = np.where(placed, np.uint8(Kind.DATA), np.uint8(Kind.BELOW))
    host = np.where(placed, host, -1)
    stored = np.zeros(len(host), np.int64)
    if zero is not None and zero.any():
        if mapping.header.version < 3:
            return None
        kind[zero] = Kind.ZERO
    if compressed is not None:
        places, lengths = compressed_places(entries, bits)
        kind[compressed] = Kind.ENCODED
        host = np.where(compressed, places.view(np.int64), host)
        stored = np.where(compressed, lengths.view(np.int64), 0)
    return _Rows(guest, kind, host, stored)


def _extended_rows(
    mapping: Qcow2Mapping, entries: Words, base: int, low: int, high: int
) -> _Rows | None:
    """A row for each cluster, numbered from ``base`` on, whose subclusters share one fate, and for
    each subcluster of the others; None if an entry breaks a rule."""
    words = entries.reshape(-1)[2 * low : 2 * high]
    entry, bitmap = words[::2], words[1::2]
    guest = (np.arange(low, high) + base) << mapping.cluster_bits
    host = (entry & np.uint64(OFFSET_MASK)).view(np.int64)
    compressed = (entry & np.uint64(COMPRESSED)) != 0
    placed = host != 0
    shift = np.uint64(SUBCLUSTERS)
    bad = host & (mapping.cluster_size - 1) != 0
    if mapping.space.external:
        placed |= (entry & np.uint64(COPIED)) != 0
        bad |= compressed | (placed & (host != guest))
    bad |= (bitmap & (bitmap >> shift) & np.uint64(ALL)) != 0
    bad |= ~placed & ((bitmap & np.uint64(ALL)) != 0)
    if not mapping.space.external:
        bad &= ~compressed
    if bad.any():
        return None
    uniform = compressed | (bitmap == 0) | (bitmap == ALL) | (bitmap == np.uint64(ALL_ZERO))
    count = np.where(uniform, 1, SUBCLUSTERS)
    index = np.repeat(np.arange(len(entry)), count)
    number = np.arange(len(index)) - (np.cumsum(count) - count)[index]
    skip = number << (mapping.cluster_bits - SUBCLUSTER_BITS)
    fate = bitmap[index] >> number.view(np.uint64)
    kind = np.full(len(index), Kind.BELOW, np.uint8)
    kind[(fate & np.uint64(1)) != 0] = Kind.DATA
    kind[(fate >> shift & np.uint64(1)) != 0] = Kind.ZERO
    encoded = compressed[index]
    kind[encoded] = Kind.ENCODED
    places, lengths = compressed_places(entry, mapping.cluster_bits)
    place = np.where(placed[index], host[index] + skip, -1)
    return _Rows(
        guest[index] + skip,
        kind,
        np.where(encoded, places.view(np.int64)[index], place),
        np.where(encoded, lengths.view(np.int64)[index], 0),
    )


def _resolved(mapping: Qcow2Mapping, start: int, stop: int) -> _Rows:
    found = Columns.from_extents(mapping.resolve(start, stop - start))
    return _Rows(found.guest_offset, found.kind, found.host_offset, found.stored_length)


def _put_cached(mapping: Qcow2Mapping, run: TableRun) -> None:
    """Tables in memory may be ahead of those in the file."""
    tables = mapping.tables
    words = tables.slice_bytes // 8
    for row, offset in enumerate(run.offsets.tolist()):
        if not offset:
            continue
        for number in range(mapping.cluster_size // tables.slice_bytes):
            cached = tables.cache.find(offset + number * tables.slice_bytes)
            if cached is not None:
                part = np.frombuffer(cached, dtype=">u8")
                run.entries[row, number * words : (number + 1) * words] = part


def _below(start: int) -> _Rows:
    """A range without tables."""
    return _Rows(
        np.array([start], np.int64),
        np.array([Kind.BELOW], np.uint8),
        np.array([-1], np.int64),
        np.zeros(1, np.int64),
    )
