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

With extended L2 entries the same holds for all 32 subclusters of a cluster together. Some of them
can be made zero, too: the cluster keeps its place then. A compressed cluster has no subclusters.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from lamina.formats.qcow2.subclusters import ALL_ZERO, SUBCLUSTER_BITS, SUBCLUSTERS, bits_of
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping

Become = Callable[[int], int]
"""What the first word of an entry becomes."""


def zero(mapping: Qcow2Mapping, offset: int, length: int, may_unmap: bool) -> bool:
    """Make guest clusters, or subclusters of one of them, read as zeroes.

    False: only writing zeroes can.
    """
    first, count = offset >> mapping.cluster_bits, length >> mapping.cluster_bits
    if length & (mapping.cluster_size - 1):
        return _zero_subclusters(mapping, offset, length)
    if mapping.header.version < 3:
        if mapping.backing() is not None:
            return False
        _change(mapping, first, count, lambda entry: 0, Cause.REQUEST)
        return True
    keep = not may_unmap or mapping.options.discard_no_unref
    become = _keeping(mapping) if keep else _zero_entry(mapping)
    _change(mapping, first, count, become, Cause.REQUEST, even_unallocated=True)
    return True


def _zero_entry(mapping: Qcow2Mapping) -> Become:
    """Of a cluster without a place that reads as zeroes. With extended L2 entries the bitmap alone
    says so, and it is ``ALL_ZERO`` whenever an entry changes."""
    flag = 0 if mapping.header.extended_l2 else ZERO_FLAG
    return lambda entry: flag


def _keeping(mapping: Qcow2Mapping, kept: list[int] | None = None) -> Become:
    """The same for clusters that keep their places; those that are ours alone are added to
    ``kept``."""
    flag = 0 if mapping.header.extended_l2 else ZERO_FLAG
    place = mapping.space.place

    def become(entry: int) -> int:
        if entry & COMPRESSED or place(entry) < 0:
            return flag
        if kept is not None and entry & COPIED:
            kept.append(place(entry))
        return entry | flag

    return become


def _zero_subclusters(mapping: Qcow2Mapping, offset: int, length: int) -> bool:
    """Mark a part of one cluster; False if it is compressed."""
    tables, bits = mapping.tables, mapping.cluster_bits
    cluster, sub = offset >> bits, bits - SUBCLUSTER_BITS
    first = (offset - (cluster << bits)) >> sub
    marks = bits_of(first, first + (length >> sub) - 1)
    tables.prepare(cluster)
    for _, _, words in tables.walk(cluster, 1):
        assert words is not None
        entry, bitmap = words
        if entry & COMPRESSED:
            return False
        after = (bitmap | marks << SUBCLUSTERS) & ~marks
        if after != bitmap:
            tables.store(cluster, array("Q", [entry, after]))
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
    kept: list[int] = []
    keep = mapping.options.discard_no_unref and cause is Cause.REQUEST
    become = _keeping(mapping, kept) if keep else _zero_entry(mapping)
    _change(
        mapping, first, count, become, cause,
        even_unallocated=has_backing, leave_unallocated=not has_backing,
    )
    if kept and cause in mapping.allocator.pass_discard:
        mapping.space.empty_later(kept)


def _change(
    mapping: Qcow2Mapping,
    first: int,
    count: int,
    become: Become,
    cause: Cause,
    *,
    even_unallocated: bool = False,
    leave_unallocated: bool = False,
) -> None:
    """Replace entries; what they named is freed once the new ones are durable.

    Where there is no L2 table, one is made only for ``even_unallocated``; entries that say nothing
    stay as they are with ``leave_unallocated``.
    """
    tables = mapping.tables
    freed: list[Freed] = []
    end = first + count
    change = _change_pairs if mapping.header.extended_l2 else _change_entries
    try:
        while first < end:
            stop = min(((first >> tables.l2_bits) + 1) << tables.l2_bits, end)
            if even_unallocated:
                tables.prepare(first)
            for cluster, part, entries in tables.walk(first, stop - first):
                if entries is not None:
                    change(mapping, cluster, entries, become, cause, leave_unallocated, freed)
                first = cluster + part
    finally:
        # What was replaced before an error is free all the same.
        mapping.space.free_later(freed)


def _change_entries(
    mapping: Qcow2Mapping,
    cluster: int,
    entries: array[int],
    become: Become,
    cause: Cause,
    leave_unallocated: bool,
    freed: list[Freed],
) -> None:
    first = entries[0]
    place = mapping.space.place
    if not first & COMPRESSED and place(first) < 0 and entries.count(first) == len(entries):
        # Nothing but nothing, of which a large disk has much.
        if become(first) != first and (first or not leave_unallocated):
            mapping.tables.prepare(cluster)
            mapping.tables.store(cluster, array("Q", [become(first)]) * len(entries))
        return
    new = array("Q", map(become, entries))
    if leave_unallocated and 0 in entries:
        new = array("Q", [old and one for old, one in zip(entries, new, strict=True)])
    if new == entries:
        return
    mapping.tables.prepare(cluster)
    gone: list[Freed] = []
    for number, (old, entry) in enumerate(zip(entries, new, strict=True)):
        if old != entry and (old & COMPRESSED or place(old) != place(entry)):
            mapping.reading.check(cluster + number, entries, number)
            gone += mapping.space.references(old, mapping.cluster_bits, cause)
    mapping.tables.store(cluster, new)
    freed += gone


def _change_pairs(
    mapping: Qcow2Mapping,
    cluster: int,
    words: array[int],
    become: Become,
    cause: Cause,
    leave_unallocated: bool,
    freed: list[Freed],
) -> None:
    """The same for extended L2 entries."""
    space = mapping.space
    new = array("Q", words)
    gone: list[Freed] = []
    for at in range(0, len(words), 2):
        old, bitmap = words[at], words[at + 1]
        if leave_unallocated and not old and not bitmap:
            continue
        entry = become(old)
        new[at], new[at + 1] = entry, ALL_ZERO
        if old & COMPRESSED or space.place(old) != space.place(entry):
            if old & COMPRESSED:
                mapping.reading.check_compressed(cluster + at // 2)
            elif old & OFFSET_MASK:
                mapping.reading.check_place(cluster + at // 2, old & OFFSET_MASK)
            gone += space.references(old, mapping.cluster_bits, cause)
    if new == words:
        return
    mapping.tables.prepare(cluster)
    mapping.tables.store(cluster, new)
    freed += gone
