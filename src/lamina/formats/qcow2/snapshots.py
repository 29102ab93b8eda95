"""Internal snapshots: reading the table that lists them."""

from __future__ import annotations

import errno

from lamina.block.info import SnapshotInfo
from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.layout import MAX_L1, is_valid_table
from lamina.formats.qcow2.snapshot_layout import (
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE,
    Snapshot,
    parse_snapshot,
)
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header


def read_snapshots(file: Node, header: Header) -> list[Snapshot]:
    """All entries of the table, read piece by piece: it may be long. Raises ImageCorrupt."""
    snapshots: list[Snapshot] = []
    piece, piece_start = b"", 0
    position = 0
    for index in range(header.nb_snapshots):
        if position + _LONGEST > piece_start + len(piece):
            piece, piece_start = _read_piece(file, header, position), position
        _check_extra(piece, position - piece_start, index, header)
        snapshot = parse_snapshot(piece, position - piece_start, index)
        snapshot.entry_offset = position
        snapshots.append(snapshot)
        position += snapshot.entry_length
        if position > MAX_SNAPSHOT_TABLE:
            error = _error("Snapshot table is too big", header)
            surplus = header.nb_snapshots - index
            error.hint = (
                f"You can force-remove all {surplus} overhanging snapshots with "
                "qemu-img check -r all"
            )
            raise error
    return snapshots


_LONGEST = 40 + MAX_SNAPSHOT_EXTRA + 2 * 65535 + 8
"""Bytes of an entry: names are at most 64 KiB each, extra data is bounded."""
_PIECE = 1 << 20


def _read_piece(file: Node, header: Header, position: int) -> bytes:
    """What lies behind the end of the file reads as zeroes: entries without names."""
    start = header.snapshots_offset + position
    length = min(_PIECE, header.nb_snapshots * _LONGEST)
    there = max(0, min(file.size - start, length))
    return (file.read(start, there) if there else b"").ljust(length, b"\0")


def _check_extra(piece: bytes, start: int, index: int, header: Header) -> None:
    if int.from_bytes(piece[start + 36 : start + 40], "big") > MAX_SNAPSHOT_EXTRA:
        error = _error(f"Too much extra metadata in snapshot table entry {index}", header)
        error.hint = (
            "You can force-remove this extra metadata with qemu-img check -r all"
        )
        raise error


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
