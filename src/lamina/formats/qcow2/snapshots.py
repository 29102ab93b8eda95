"""Internal snapshots: reading the table that lists them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from lamina.block.info import SnapshotInfo
from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.layout import (
    MAX_L1,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE,
    Snapshot,
    is_valid_table,
    parse_snapshots,
)

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header


def read_snapshots(file: Node, header: Header) -> list[Snapshot]:
    """All entries of the table. Raises ImageCorrupt."""
    if not header.nb_snapshots:
        return []
    room = max(0, file.size - header.snapshots_offset)
    table = file.read(header.snapshots_offset, min(room, _longest(header.nb_snapshots)))
    snapshots = parse_snapshots(table, header.nb_snapshots)
    last = snapshots[-1]
    if last.entry_offset + last.entry_length > MAX_SNAPSHOT_TABLE:
        raise _error("Snapshot table is too big", header)
    for index, snapshot in enumerate(snapshots):
        if snapshot.extra_data_size > MAX_SNAPSHOT_EXTRA:
            error = _error(f"Too much extra metadata in snapshot table entry {index}", header)
            error.hint = (
                "You can force-remove this extra metadata by updating the image via "
                "'qemu-img check -r all'"
            )
            raise error
    return snapshots


def _longest(count: int) -> int:
    """Bytes that the entries can take: names are at most 64 KiB each, extra data is bounded."""
    return min(MAX_SNAPSHOT_TABLE, count * (40 + MAX_SNAPSHOT_EXTRA + 2 * 65535 + 8))


def _error(message: str, header: Header) -> ImageCorrupt:
    return ImageCorrupt(
        message,
        format="qcow2",
        structure="snapshot table",
        offset=header.snapshots_offset,
        errno=errno.EFBIG,
    )


def check_l1(snapshot: Snapshot, header: Header) -> None:
    """Raises ImageCorrupt if the snapshot's L1 table cannot be read."""

    def error(message: str, number: int) -> ImageCorrupt:
        return ImageCorrupt(
            message,
            format="qcow2",
            structure="snapshot",
            field=snapshot.name,
            offset=snapshot.l1_table_offset,
            errno=number,
        )

    if snapshot.l1_size * 8 > MAX_L1:
        raise error("Snapshot L1 table too large", errno.EFBIG)
    if not is_valid_table(snapshot.l1_table_offset, snapshot.l1_size * 8, header.cluster_size):
        raise error("Snapshot L1 table offset invalid", errno.EINVAL)


def snapshot_info(snapshot: Snapshot) -> SnapshotInfo:
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 1_000_000_000)
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_size,
        date_sec=snapshot.date_sec,
        date_nsec=snapshot.date_nsec,
        vm_clock_sec=seconds,
        vm_clock_nsec=nanoseconds,
        icount=snapshot.icount,
    )
