"""The snapshot table, as a check reads it: with entries that nobody else could use."""

from __future__ import annotations

import errno

from lamina.errors import StorageError
from lamina.formats.qcow2.arrays import BATCH, read_into
from lamina.formats.qcow2.layout import MAX_SNAPSHOTS, MIN_SNAPSHOT
from lamina.formats.qcow2.snapshot_layout import (
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE,
    Snapshot,
    parse_snapshot,
)
from lamina.hints import TYPE_CHECKING, NoReturn
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.formats.qcow2.check import ImageCheck

NB_SNAPSHOTS = 60
"""Offset of this field of the header."""

_UNREADABLE = "failed to read the snapshot table"


class SnapshotCheck:
    """The part of an ``ImageCheck`` that reads the snapshot table."""

    def __init__(self, image: ImageCheck) -> None:
        self._image = image
        self.file = image.file
        self.header = image.header
        self.mended = False
        """The table has to be written as ``run`` returned it."""
        self._piece = (0, b"")
        """Where it is, and what was read of the table last."""

    def run(self) -> list[Snapshot]:
        """All entries, mended where that is allowed. Raises StorageError (EFBIG) if there are too
        many or if one of them is too large."""
        header, mends = self.header, self._image.fix.errors
        snapshots: list[Snapshot] = []
        count = header.nb_snapshots
        if count > MAX_SNAPSHOTS:
            surplus = count - MAX_SNAPSHOTS
            if not mends:
                self._give_up("snapshot table too large", f"all {surplus} overhanging snapshots")
            self._discard(f"{surplus} overhanging snapshots", surplus)
            count = MAX_SNAPSHOTS
        position = kept = 0
        for index in range(count):
            snapshot, extra = self._read_snapshot(position, index)
            if extra > MAX_SNAPSHOT_EXTRA:
                what = f"too much extra metadata in snapshot table entry {index}"
                if not mends:
                    what = "T" + what[1:]
                    self._give_up(f"{_UNREADABLE}: {what}", "this extra metadata")
                self._discard(f"{what} ({extra} > {MAX_SNAPSHOT_EXTRA})", 1)
                self.mended = True
            kept += snapshot.entry_length - max(extra - MAX_SNAPSHOT_EXTRA, 0)
            if kept > MAX_SNAPSHOT_TABLE:
                surplus = count - index
                what = f"{surplus} overhanging snapshots"
                if not mends:
                    self._give_up(f"{_UNREADABLE}: Snapshot table is too big", f"all {what}")
                self._discard(f"{what} (snapshot table is too big)", surplus)
                break
            position += snapshot.entry_length
            if header.version >= 3 and extra < 16:
                self._image.corruption(f" snapshot table entry {index} is incomplete", mended=mends)
                self.mended |= mends
            snapshots.append(snapshot)
        if len(snapshots) < header.nb_snapshots:
            # Their clusters are leaks from now on, so nobody may know of them any more.
            header.nb_snapshots = len(snapshots)
            self.file.write(NB_SNAPSHOTS, header.nb_snapshots.to_bytes(4, "big"))
            self.file.flush()
        return snapshots

    def _give_up(self, what: str, removable: str) -> NoReturn:
        self._image.report(f"error: ERROR {what}")
        self._image.report(f"You can force-remove {removable} with qemu-img check -r all")
        raise StorageError.from_errno(errno.EFBIG)

    def _discard(self, what: str, corruptions: int) -> None:
        self._image.report(f"Discarding {what}")
        self._image.result.corruptions_fixed += corruptions

    def _read_snapshot(self, position: int, index: int) -> tuple[Snapshot, int]:
        """An entry, with no more extra data than is allowed; how much it has in the file."""
        start = self.header.snapshots_offset + position
        fixed = bytearray(self._read(start, MIN_SNAPSHOT))
        extra = int.from_bytes(fixed[36:40], "big")
        names = int.from_bytes(fixed[12:14], "big") + int.from_bytes(fixed[14:16], "big")
        kept = min(extra, MAX_SNAPSHOT_EXTRA)
        fixed[36:40] = kept.to_bytes(4, "big")
        entry = bytes(fixed) + self._read(start + MIN_SNAPSHOT, kept)
        entry += self._read(start + MIN_SNAPSHOT + extra, names)
        snapshot = parse_snapshot(entry, 0, index)
        snapshot.entry_offset = position
        snapshot.entry_length = round_up(MIN_SNAPSHOT + extra + names, 8)
        return snapshot, extra

    def _read(self, offset: int, length: int) -> bytes:
        """A part of the snapshot table; parts that follow cost nothing."""
        start, piece = self._piece
        if not start <= offset <= offset + length <= start + len(piece):
            buffer = bytearray(max(length, BATCH))
            read_into(self.file, [(offset, memoryview(buffer))])
            start, piece = self._piece = offset, bytes(buffer)
        return piece[offset - start : offset - start + length]
