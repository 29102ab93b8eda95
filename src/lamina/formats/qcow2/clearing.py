"""Zeroing and discarding whole clusters: changes of L2 entries, no guest data moves.

What an entry becomes:

    entry              discard            zero                 zero, may unmap
    compressed         zero               zero                 zero
    data               zero               zero, kept           zero
    zero, kept         zero               as it is             zero
    zero               as it is           as it is             as it is
    unallocated        zero (*)           zero                 zero

"zero" names no host cluster (the old one is freed), "zero, kept" still has its own; (*) only above
a backing file. Version 2 has no zero clusters: there everything becomes unallocated, unless there
is a backing file whose content would show; then nothing is changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO_FLAG
from lamina.formats.qcow2.writing import references

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def zero(mapping: Qcow2Mapping, first: int, count: int, may_unmap: bool) -> bool:
    """Make guest clusters read as zeroes; False: only writing zeroes can."""
    if mapping.header.version < 3:
        if mapping.backing() is not None:
            return False
        _change(mapping, first, count, lambda entry: 0, Cause.REQUEST)
        return True
    keep = not may_unmap or mapping.options.discard_no_unref

    def become(entry: int) -> int:
        if keep and entry & OFFSET_MASK and not entry & COMPRESSED:
            return entry | ZERO_FLAG
        return ZERO_FLAG

    _change(mapping, first, count, become, Cause.REQUEST, even_unallocated=True)
    return True


def discard(
    mapping: Qcow2Mapping, first: int, count: int, cause: Cause = Cause.REQUEST
) -> None:
    """Guest clusters need not be kept; they read as zeroes where the format can say so."""
    has_backing = mapping.backing() is not None
    if mapping.header.version < 3:
        if not has_backing:
            _change(mapping, first, count, lambda entry: 0, cause)
        return
    keep = mapping.options.discard_no_unref and cause is Cause.REQUEST
    kept: list[int] = []

    def become(entry: int) -> int:
        if not entry and not has_backing:
            return 0
        if keep and entry & OFFSET_MASK and not entry & COMPRESSED:
            kept.append(entry & OFFSET_MASK)
            return entry | ZERO_FLAG
        return ZERO_FLAG

    _change(mapping, first, count, become, cause, even_unallocated=has_backing)
    if kept and cause in mapping.allocator.pass_discard:
        mapping.metadata.when_durable(lambda: _punch(mapping, kept))


def _punch(mapping: Qcow2Mapping, host_offsets: list[int]) -> None:
    """The content of clusters that keep their place is not needed."""
    unit = mapping.unit
    start = end = -1
    for offset in sorted(host_offsets):
        if offset != end:
            if end > start:
                mapping.allocator.discard_below(start, end - start)
            start = offset
        end = offset + unit
    mapping.allocator.discard_below(start, end - start)


def _change(
    mapping: Qcow2Mapping,
    first: int,
    count: int,
    become: Callable[[int], int],
    cause: Cause,
    *,
    even_unallocated: bool = False,
) -> None:
    """Replace entries; what they named is freed once the new ones are durable.

    Where there is no L2 table, one is made only for ``even_unallocated``.
    """
    tables = mapping.tables
    freed: list[Freed] = []
    end = first + count
    try:
        while first < end:
            stop = min(((first >> tables.l2_bits) + 1) << tables.l2_bits, end)
            if even_unallocated:
                tables.prepare(first)
            for cluster, part, entries in tables.walk(first, stop - first):
                if entries is not None:
                    _change_entries(mapping, cluster, entries, become, cause, freed)
                first = cluster + part
    finally:
        # What was replaced before an error is free all the same.
        mapping.allocator.free_later(freed)


def _change_entries(
    mapping: Qcow2Mapping,
    cluster: int,
    entries: array[int],
    become: Callable[[int], int],
    cause: Cause,
    freed: list[Freed],
) -> None:
    first = entries[0]
    if not first & (COMPRESSED | OFFSET_MASK) and entries.count(first) == len(entries):
        # Nothing but nothing, of which a large disk has much.
        if become(first) != first:
            mapping.tables.prepare(cluster)
            mapping.tables.store(cluster, array("Q", [become(first)]) * len(entries))
        return
    new = array("Q", map(become, entries))
    if new == entries:
        return
    mapping.tables.prepare(cluster)
    gone: list[Freed] = []
    for number, (old, entry) in enumerate(zip(entries, new, strict=True)):
        if old != entry and (old & COMPRESSED or (old ^ entry) & OFFSET_MASK):
            mapping.classify(cluster + number, old)
            gone += references(old, mapping.cluster_bits, cause)
    mapping.tables.store(cluster, new)
    freed += gone
