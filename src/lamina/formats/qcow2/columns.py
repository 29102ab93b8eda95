"""The extents of a whole image as arrays: the same as ``Qcow2Mapping.resolve``, table by table.

Tables are read from the file in long runs, past the cache; what the cache holds unwritten is put in
its place. Wherever an entry breaks a rule, ``resolve`` is asked instead, which knows what to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from lamina.block.extents import Columns, Kind
from lamina.formats.qcow2.arrays import (
    BATCH,
    Indices,
    TableRun,
    compressed_places,
    read_tables,
    straight_tables,
)
from lamina.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO_FLAG

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
        for run in read_tables(mapping.file, places, mapping.unit):
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
    bits, unit = mapping.cluster_bits, mapping.unit
    if (run.offsets & (unit - 1)).any():
        return _resolved(mapping, start, stop)
    if not mapping.read_only:
        _put_cached(mapping, run)
    base = l1_index * mapping.header.l2_entries
    low, high = (start >> bits) - base, -(-stop >> bits) - base
    if straight_tables(run.entries, mapping.header, 1 << 62).all():
        rows = np.arange(0, high, mapping.header.l2_entries)
        rows = np.maximum(rows[low // mapping.header.l2_entries :], low)
    else:
        rows = np.arange(low, high)
    entries = run.entries.reshape(-1)[rows]
    host = (entries & np.uint64(OFFSET_MASK)).view(np.int64)
    # Reductions first: most images have neither compressed clusters nor zeroes.
    union = int(np.bitwise_or.reduce(entries))
    compressed = (entries & np.uint64(COMPRESSED)) != 0 if union & COMPRESSED else None
    zero = (entries & np.uint64(ZERO_FLAG)) != 0 if union & ZERO_FLAG else None
    unaligned = host & (unit - 1) != 0 if union & OFFSET_MASK & (unit - 1) else None
    if compressed is not None:
        # Such an entry has its bits to itself.
        zero = None if zero is None else zero & ~compressed
        unaligned = None if unaligned is None else unaligned & ~compressed
    if unaligned is not None and unaligned.any():
        return _resolved(mapping, start, stop)
    kind = np.where(host == 0, np.uint8(Kind.BELOW), np.uint8(Kind.DATA))
    host = np.where(host == 0, -1, host)
    stored = np.zeros(len(host), np.int64)
    if zero is not None and zero.any():
        if mapping.header.version < 3:
            return _resolved(mapping, start, stop)
        kind[zero] = Kind.ZERO
    if compressed is not None:
        places, lengths = compressed_places(entries, bits)
        kind[compressed] = Kind.ENCODED
        host = np.where(compressed, places.view(np.int64), host)
        stored = np.where(compressed, lengths.view(np.int64), 0)
    guest = (rows + base) << bits
    # The range may begin within a cluster.
    if host[0] >= 0 and kind[0] != Kind.ENCODED:
        host[0] += start - int(guest[0])
    guest[0] = start
    return _Rows(guest, kind, host, stored)


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
        for number in range(mapping.unit // tables.slice_bytes):
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
