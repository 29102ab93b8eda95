"""Changing the size of the guest disk."""

from __future__ import annotations

import errno
from array import array

from lamina.block.limits import Preallocation, WriteFlags
from lamina.engine.metadata import Stage
from lamina.errors import ImageUnsupported, UsageError
from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.clearing import discard, zero
from lamina.formats.qcow2.layout import COMPRESSED, MAX_L1, ZERO_FLAG
from lamina.formats.qcow2.preallocation import clusters_needed, end_of_file, preallocate
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def resize(mapping: Qcow2Mapping, size: int, preallocation: Preallocation) -> None:
    """Make the disk ``size`` bytes long. Raises UsageError, ImageUnsupported, StorageError."""
    header = mapping.header
    if size % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}")
    if mapping.snapshots and header.version < 3:
        raise ImageUnsupported("Can't resize a v2 image which has snapshots")
    if mapping.has_bitmaps:
        mapping.bitmaps.before_resize()
    if size < header.size:
        if preallocation is not Preallocation.OFF:
            raise UsageError("Preallocation can't be used for shrinking an image")
        _shrink(mapping, size)
    else:
        _grow(mapping, size, preallocation)


# -- growing -------------------------------------------------------------------------------------


def _grow(mapping: Qcow2Mapping, size: int, preallocation: Preallocation) -> None:
    header, tables = mapping.header, mapping.tables
    old_size = header.size
    entries = -(-size // (header.l2_entries << header.cluster_bits))
    if entries * 8 > MAX_L1:
        raise ImageUnsupported("Failed to grow the L1 table: File too large", errno=errno.EFBIG)
    tables.grow_l1(entries, exactly=True)
    _drop_behind(mapping, -(-old_size // mapping.cluster_size), entries)
    backing = mapping.backing()
    below = 0 if backing is None else min(backing.size, size)
    _zero_tail(mapping, old_size, size, shines_through=below > old_size)
    first, end = -(-old_size // mapping.cluster_size), -(-below // mapping.cluster_size)
    # What the backing file has behind the old end must not show.
    unit = mapping.cluster_size
    if end > first and not zero(mapping, first * unit, (end - first) * unit, may_unmap=False):
        for cluster in range(first, end):
            _write(mapping, cluster * unit, bytearray(unit))
            mapping.metadata.relieve()
    if mapping.space.external:
        _grow_data_file(mapping, old_size, size, preallocation)
    elif preallocation is not Preallocation.OFF:
        _preallocate(mapping, old_size, size, preallocation)
    # The header must not promise more than the L1 table that it names can hold.
    mapping.metadata.commit()
    header.size = mapping.size = size
    mapping.metadata.put(Stage.ROOTS, 24, size.to_bytes(8, "big"))
    mapping.metadata.commit()


def _drop_behind(mapping: Qcow2Mapping, first: int, l1_entries: int) -> None:
    """Forget what is mapped behind the end of the disk (VM state): it must not become data."""
    tables = mapping.tables
    end = l1_entries << tables.l2_bits
    mapped = any(
        entries is not None and any(entries) for _, _, entries in tables.walk(first, end - first)
    )
    if mapped:
        unmap(mapping, first, end)


def _zero_tail(mapping: Qcow2Mapping, old_size: int, size: int, *, shines_through: bool) -> None:
    """The rest of the last cluster becomes part of the disk: it may hold what was cut off.

    ``shines_through``: the backing file has something there.
    """
    within = old_size % mapping.cluster_size
    disk = mapping.disk
    if not within or disk is None:
        return
    start = old_size - within
    entry = mapping.tables.entry(start >> mapping.cluster_bits)
    if entry & ZERO_FLAG and not entry & COMPRESSED:
        return
    content = bytearray(mapping.cluster_size)
    disk.reader.read([(start, memoryview(content))])
    end = within + min(mapping.cluster_size - within, size - old_size)
    if any(content[within:end]) or (not entry and shines_through):
        content[within:] = bytes(mapping.cluster_size - within)
        _write(mapping, start, content)


def _write(mapping: Qcow2Mapping, start: int, content: bytearray) -> None:
    """Write whole clusters from the guest offset ``start`` on, while nobody else writes.

    ``content`` may be encrypted on the way.
    """
    reservation = mapping.reserve([(start, len(content))])
    try:
        for piece in reservation.pieces:
            skip = piece.guest_offset - start
            data = memoryview(content)[skip : skip + piece.length]
            if piece.cipher is not None:
                piece.cipher.encrypt(data, piece.first_sector)
            piece.node.writev([(piece.host_offset, data)])
            mapping.metadata.data_written(piece.node)
    except BaseException:
        reservation.abort()
        raise
    reservation.commit()


def _preallocate(
    mapping: Qcow2Mapping, old_size: int, size: int, preallocation: Preallocation
) -> None:
    """Map the new part of the disk to the end of the file, where everything reads as zeroes."""
    start = end_of_file(mapping)
    first = -(-old_size // mapping.cluster_size)
    clusters = -(-size // mapping.cluster_size) - first
    if clusters <= 0:
        return
    if preallocation is not Preallocation.METADATA:
        # Tables included: they are a little less than what a new image of this size needs.
        needed = clusters_needed(mapping.header, clusters) * mapping.cluster_size
        mapping.file.truncate(start + needed, preallocation)
        mapping.metadata.data_written(mapping.file)
    preallocate(mapping, first * mapping.cluster_size, size, start)


def _grow_data_file(
    mapping: Qcow2Mapping, old_size: int, size: int, preallocation: Preallocation
) -> None:
    """The new part of the disk lies in a file that grows with it."""
    node, unit = mapping.data_node, mapping.cluster_size
    maps = preallocation is not Preallocation.OFF or mapping.raw_node is not None
    first = round_up(old_size, unit)
    if maps and node.size > first:
        # What somebody has left behind the end of the disk must not become a part of it.
        node.write_zeroes(first, min(node.size, size) - first, WriteFlags.MAY_UNMAP)
    end = round_up(size, mapping.unit) if maps else size
    if node.size < end:
        allocates = preallocation in (Preallocation.FALLOC, Preallocation.FULL)
        node.truncate(end, preallocation if allocates else Preallocation.OFF)
    if maps:
        preallocate(mapping, first, size, end_of_file(mapping))
        node.flush()


# -- shrinking -----------------------------------------------------------------------------------


def _shrink(mapping: Qcow2Mapping, size: int) -> None:
    header, tables = mapping.header, mapping.tables
    old_size = header.size
    # First what the header says, so that a crash never leaves a disk without its end.
    entries = -(-size // (header.l2_entries << header.cluster_bits))
    end = max(len(tables.l1) << tables.l2_bits, -(-old_size // mapping.cluster_size))
    first = -(-size // mapping.cluster_size)
    header.size = mapping.size = size
    mapping.metadata.put(Stage.ROOTS, 24, size.to_bytes(8, "big"))
    mapping.metadata.commit()
    within_table = min(entries << tables.l2_bits, end)
    if within_table > first:
        # The last table that stays: its end is unallocated, or zero above a backing file.
        discard(mapping, first, within_table - first, Cause.OTHER)
    _shrink_l1(mapping, entries)
    mapping.metadata.commit(counts=True)
    mapping.metadata.barrier()
    mapping.allocator.drop_empty_blocks()
    cut_tail(mapping)
    if mapping.space.external and mapping.data_node.size > size:
        mapping.data_node.truncate(size)


def _shrink_l1(mapping: Qcow2Mapping, entries: int) -> None:
    """Give back the L2 tables behind the new end, with everything they name."""
    tables = mapping.tables
    mapping.file.event("l1_shrink_write_table")
    unmap(mapping, entries << tables.l2_bits, len(tables.l1) << tables.l2_bits)
    mapping.file.event("l1_shrink_free_l2_clusters")


def unmap(
    mapping: Qcow2Mapping, first: int, end: int, cause: Cause = Cause.OTHER
) -> None:
    """Make guest clusters unallocated; L2 tables that lie wholly in the range are given back."""
    tables, bits, space = mapping.tables, mapping.cluster_bits, mapping.space
    freed: list[Freed] = []
    freed_tables: list[Freed] = []
    while first < end:
        l1_index = first >> tables.l2_bits
        start = l1_index << tables.l2_bits
        stop = min(start + tables.l2_entries, end)
        offset = tables.table_offset(l1_index)
        if offset:
            whole = first == start and stop == start + tables.l2_entries
            if not whole:
                tables.prepare(first)
            for cluster, part, entries in tables.walk(first, stop - first):
                assert entries is not None
                for entry in entries[:: tables.entry_words]:
                    freed += space.references(entry, bits, cause) if entry else ()
                if not whole:
                    tables.store(cluster, array("Q", bytes(tables.entry_size * part)))
            if whole:
                tables.unhook(l1_index)
                freed_tables.append(Freed(offset >> bits, 1))
        first = stop
    space.free_later(freed)
    mapping.allocator.free_later(freed_tables)


def cut_tail(mapping: Qcow2Mapping) -> None:
    """Let the file end with its last cluster in use. A failure costs nothing but space."""
    last = mapping.allocator.last_used()
    end = (last + 1) << mapping.cluster_bits
    if mapping.file.size > end:
        mapping.file.truncate(end)
