"""Internal snapshots: made, applied, deleted, and shown in place of the disk.

A snapshot is a copy of the L1 table; everything below is shared and counted. While that is being
changed the image carries the dirty bit (version 3), so that a crash in between is repaired by
whoever opens it next. The order makes every crash harmless even without:

* make: COPIED flags off, counts up, the copy of the L1 table, the new snapshot table, the header;
* apply: counts up, a new active L1 table, the header, counts of the old one down, flags on;
* delete: the new snapshot table, the header, counts down, flags on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lamina.engine.metadata import Stage
from lamina.errors import ImageUnsupported, LaminaError, StorageError
from lamina.formats.qcow2.allocation import Cause, Freed
from lamina.formats.qcow2.header import is_lazy, write_features
from lamina.formats.qcow2.layout import COPIED, INCOMPAT_DIRTY, MAX_SNAPSHOTS
from lamina.formats.qcow2.refcounts import read_table, to_big_endian
from lamina.formats.qcow2.resize import unmap
from lamina.formats.qcow2.snapshot_layout import (
    MAX_SNAPSHOT_TABLE,
    Snapshot,
    pack_snapshots,
    parse_snapshots,
    snapshot_table_length,
)
from lamina.formats.qcow2.snapshots import check_l1
from lamina.formats.qcow2.trees import Tree, clear_copied, set_copied
from lamina.hints import TYPE_CHECKING
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.info import SnapshotInfo
    from lamina.formats.qcow2.mapping import Qcow2Mapping

NEW_EXTRA_DATA_SIZE = 24
"""Bytes: VM state size, disk size, icount."""


def find(mapping: Qcow2Mapping, name: str, message: str) -> Snapshot:
    """By id or name. Raises ImageUnsupported (ENOENT) with ``message``."""
    for snapshot in mapping.snapshots:
        if name in (snapshot.id, snapshot.name):
            return snapshot
    raise ImageUnsupported(message, errno=errno.ENOENT)


def create(mapping: Qcow2Mapping, info: SnapshotInfo) -> None:
    """Keep the disk as it is now. Raises StorageError (EINVAL) where a count cannot rise."""
    _refuse_data_file(mapping)
    if len(mapping.snapshots) >= MAX_SNAPSHOTS:
        raise StorageError.from_errno(errno.EFBIG)
    header, file = mapping.header, mapping.file
    with _changing(mapping):
        shared = Tree(file, header, header.l1_table_offset, header.l1_size, with_l1=False)
        shared.check(1)
        clear_copied(file, header)
        shared.change(1)
        mapping.reload()
        l1 = mapping.tables.l1
        clusters = max(-(-len(l1) * 8 // header.cluster_size), 1)
        offset = mapping.allocator.allocate_table(clusters, "L1 table")
        mapping.metadata.put(Stage.TABLES, offset, to_big_endian(l1))
        snapshot = Snapshot(
            id=_next_id(mapping),
            name=info.name,
            l1_table_offset=offset,
            l1_size=len(l1),
            date_sec=info.date_sec,
            date_nsec=info.date_nsec,
            vm_clock_nsec=info.vm_clock_sec * 1_000_000_000 + info.vm_clock_nsec,
            vm_state_size=info.vm_state_size,
            disk_size=header.size,
            icount=info.icount,
            extra_data_size=NEW_EXTRA_DATA_SIZE,
        )
        _store_table(mapping, [*mapping.snapshots, snapshot])
        # The snapshot has the VM state now; the disk does not need it any more.
        tables = mapping.tables
        unmap(mapping, mapping.vmstate_offset >> mapping.cluster_bits, len(l1) << tables.l2_bits)


def _refuse_data_file(mapping: Qcow2Mapping) -> None:
    """A data file has one place for every cluster: nothing in it can be kept beside the new."""
    if mapping.space.external:
        raise ImageUnsupported("Operation not supported")


def _next_id(mapping: Qcow2Mapping) -> str:
    numbers = [int(s.id) for s in mapping.snapshots if s.id.isascii() and s.id.isdigit()]
    return str(max(numbers, default=0) + 1)


def delete(mapping: Qcow2Mapping, name: str) -> None:
    snapshot = find(mapping, name, "snapshot not found")
    check_l1(snapshot, mapping.header)
    header, file = mapping.header, mapping.file
    with _changing(mapping):
        tree = Tree(file, header, snapshot.l1_table_offset, snapshot.l1_size, with_l1=True)
        tree.check(-1)
        _store_table(mapping, [one for one in mapping.snapshots if one is not snapshot])
        _settle(mapping)
        tree = Tree(file, header, snapshot.l1_table_offset, snapshot.l1_size, with_l1=True)
        allocator = mapping.allocator
        passes = Cause.SNAPSHOT in allocator.pass_discard
        tree.change(-1, allocator.discard_below if passes else None)
        set_copied(file, header)
        mapping.reload()


def apply(mapping: Qcow2Mapping, name: str) -> None:
    """The disk becomes what it was, its length included; the snapshot stays."""
    try:
        _refuse_data_file(mapping)
    except ImageUnsupported as error:
        raise error.in_context("Failed to load snapshot: ") from None
    snapshot = find(mapping, name, "Failed to load snapshot: No such file or directory")
    header, file = mapping.header, mapping.file
    try:
        check_l1(snapshot, header)
    except LaminaError as error:
        mapping.warn(f"error: {error}")
        number = StorageError.from_errno(error.errno)
        raise number.in_context("Failed to load snapshot: ") from None
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    if size != header.size and header.version < 3:
        raise ImageUnsupported("Can't resize a v2 image which has snapshots")
    with _changing(mapping):
        Tree(file, header, snapshot.l1_table_offset, snapshot.l1_size, with_l1=False).check(1)
        old = (header.l1_table_offset, header.l1_size)
        Tree(file, header, *old, with_l1=True).check(-1)
        shared = Tree(file, header, snapshot.l1_table_offset, snapshot.l1_size, with_l1=False)
        shared.change(1)
        mapping.reload()
        l1 = read_table(file, snapshot.l1_table_offset, snapshot.l1_size)
        for index, entry in enumerate(l1):
            l1[index] = entry & ~COPIED
        needed = -(-size // (header.l2_entries << header.cluster_bits))
        l1.extend([0] * (needed - len(l1)))
        clusters = max(-(-len(l1) * 8 // header.cluster_size), 1)
        offset = mapping.allocator.allocate_table(clusters, "L1 table")
        mapping.metadata.put(Stage.TABLES, offset, to_big_endian(l1))
        header.size = mapping.size = size
        header.l1_table_offset, header.l1_size = offset, len(l1)
        # Length and place of the table in one write, of a part of one sector.
        fields = size.to_bytes(8, "big") + header.crypt_method.to_bytes(4, "big")
        fields += len(l1).to_bytes(4, "big") + offset.to_bytes(8, "big")
        mapping.metadata.put(Stage.ROOTS, 24, fields)
        _settle(mapping)
        Tree(file, header, *old, with_l1=True).change(-1)
        set_copied(file, header)
        mapping.reload()


def load(mapping: Qcow2Mapping, name: str) -> None:
    """Read from the snapshot instead of the disk; the image must be open for reading only."""
    snapshot = find(mapping, name, "Can't find snapshot")
    header = mapping.header
    check_l1(snapshot, header)
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    mapping.header = mapping.tables.header = replace(
        header,
        size=size,
        l1_table_offset=snapshot.l1_table_offset,
        l1_size=snapshot.l1_size,
    )
    mapping.size = size
    mapping.reload()


@contextmanager
def _changing(mapping: Qcow2Mapping) -> Iterator[None]:
    """Nothing is held back in memory when it begins, and all is durable when it ends."""
    mapping.before_first_write()
    _settle(mapping)
    header = mapping.header
    marks = header.version >= 3 and not header.incompatible_features & INCOMPAT_DIRTY
    if marks:
        header.incompatible_features |= INCOMPAT_DIRTY
        write_features(mapping)
    try:
        yield
        _settle(mapping)
    except BaseException:
        mapping.reload()
        raise
    if marks and not is_lazy(mapping):
        header.incompatible_features &= ~INCOMPAT_DIRTY
        write_features(mapping)


def _settle(mapping: Qcow2Mapping) -> None:
    mapping.metadata.commit(counts=True)
    mapping.metadata.barrier()


def rewrite_table(mapping: Qcow2Mapping, found: list[Snapshot]) -> None:
    """Write the entries that a check found, mended, to a new table. Durable on return."""
    header = mapping.header
    end = header.snapshots_offset + snapshot_table_length(found)
    # A table that is not all there has no clusters to give back.
    mapping.snapshots[:] = found if end <= mapping.file.size else []
    _store_table(mapping, found)
    _settle(mapping)


def _store_table(mapping: Qcow2Mapping, snapshots: list[Snapshot]) -> None:
    """Have the header name a new snapshot table; the old one is freed."""
    header, cluster_size = mapping.header, mapping.header.cluster_size
    # Entries of version 2 need not say how long the disk was: it cannot have changed since.
    packed = pack_snapshots(
        [
            one if one.disk_size is not None else replace(one, disk_size=header.size)
            for one in snapshots
        ]
    )
    if len(packed) > MAX_SNAPSHOT_TABLE:
        raise ImageUnsupported("Snapshot table is too big", errno=errno.EFBIG)
    old_offset, old_length = header.snapshots_offset, snapshot_table_length(mapping.snapshots)
    offset = 0
    if packed:
        clusters = -(-len(packed) // cluster_size)
        offset = mapping.allocator.allocate_table(clusters, "snapshot table")
        mapping.metadata.put(Stage.TABLES, offset, packed)
    header.nb_snapshots, header.snapshots_offset = len(snapshots), offset
    fields = len(snapshots).to_bytes(4, "big") + offset.to_bytes(8, "big")
    mapping.metadata.put(Stage.ROOTS, 60, fields)
    if old_length:
        clusters = -(-old_length // cluster_size)
        mapping.allocator.free_later([Freed(old_offset >> mapping.cluster_bits, clusters)])
    mapping.snapshots[:] = parse_snapshots(packed, len(snapshots))
