"""The snapshot table on disk ("Snapshots"): bytes to dataclasses and back. Nothing here does I/O.

All integers are big-endian, all offsets and sizes are bytes.
"""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.fields import bytes_of, corrupt, text_of
from lamina.formats.qcow2.layout import MIN_SNAPSHOT
from lamina.records import dataclass
from lamina.units import MIB, round_up

MAX_SNAPSHOT_TABLE = 64 * MIB
MAX_SNAPSHOT_EXTRA = 1024

_SNAPSHOT = struct.Struct(">QIHHIIQII")
assert _SNAPSHOT.size == MIN_SNAPSHOT


@dataclass
class Snapshot:
    """One entry of the snapshot table."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    """Entries."""
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    """Bytes; the 64-bit field where there is one."""
    disk_size: int | None = None
    """Guest bytes when it was taken; None: the entry does not say, as in version 2."""
    icount: int | None = None
    unknown_extra: bytes = b""
    """Extra data behind the fields that this version knows."""
    extra_data_size: int = 24
    """As found on disk."""
    entry_offset: int = 0
    """Of the entry in the table."""
    entry_length: int = 0


def snapshot_table_length(snapshots: list[Snapshot]) -> int:
    """Bytes that the entries take."""
    return snapshots[-1].entry_offset + snapshots[-1].entry_length if snapshots else 0


def parse_snapshots(table: bytes, count: int) -> list[Snapshot]:
    """``count`` entries from the start of ``table`` (which may be longer).

    Raises ImageCorrupt if an entry runs out of the table.
    """
    snapshots = []
    position = 0
    for index in range(count):
        snapshot = parse_snapshot(table, position, index)
        snapshots.append(snapshot)
        position += snapshot.entry_length
    return snapshots


def parse_snapshot(table: bytes, position: int, index: int) -> Snapshot:
    """The entry at ``position``; ``index`` is for messages."""
    if position + _SNAPSHOT.size > len(table):
        raise _snapshot_error("Snapshot table is too short", index, position)
    (l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state32, extra_size) = (
        _SNAPSHOT.unpack_from(table, position)
    )
    start = position + _SNAPSHOT.size
    end = start + extra_size + id_size + name_size
    if end > len(table):
        raise _snapshot_error("Snapshot table is too short", index, position)
    extra = table[start : start + extra_size]
    snapshot = Snapshot(
        id=text_of(table[start + extra_size : start + extra_size + id_size]),
        name=text_of(table[start + extra_size + id_size : end]),
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        date_sec=sec,
        date_nsec=nsec,
        vm_clock_nsec=clock,
        vm_state_size=state32,
        unknown_extra=extra[24:],
        extra_data_size=extra_size,
        entry_offset=position,
        entry_length=round_up(end - position, 8),
    )
    if extra_size >= 8:
        snapshot.vm_state_size = int.from_bytes(extra[:8], "big")
    if extra_size >= 16:
        snapshot.disk_size = int.from_bytes(extra[8:16], "big")
    if extra_size >= 24:
        icount = int.from_bytes(extra[16:24], "big")
        snapshot.icount = None if icount == (1 << 64) - 1 else icount
    return snapshot


def pack_snapshots(snapshots: list[Snapshot]) -> bytes:
    """The table, each entry padded to 8 bytes."""
    return b"".join(_pack_snapshot(snapshot) for snapshot in snapshots)


def _pack_snapshot(s: Snapshot) -> bytes:
    icount = (1 << 64) - 1 if s.icount is None else s.icount
    extra = struct.pack(">QQQ", s.vm_state_size, s.disk_size or 0, icount) + s.unknown_extra
    id, name = bytes_of(s.id), bytes_of(s.name)
    fixed = _SNAPSHOT.pack(
        s.l1_table_offset,
        s.l1_size,
        len(id),
        len(name),
        s.date_sec,
        s.date_nsec,
        s.vm_clock_nsec,
        s.vm_state_size if s.vm_state_size < 1 << 32 else 0,
        len(extra),
    )
    entry = fixed + extra + id + name
    return entry.ljust(round_up(len(entry), 8), b"\0")


def _snapshot_error(message: str, index: int, offset: int) -> ImageCorrupt:
    return corrupt(
        message, structure="snapshot table", field=f"entry {index}", offset=offset
    )
