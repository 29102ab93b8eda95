"""Zeroing and discarding: by tables alone where the format can, else in the places of the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.engine.batches import ROUND, place
from lamina.engine.copies import Copies, reads_zero
from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING
from lamina.units import round_down, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node, WriteRequest
    from lamina.engine.disk import Disk
    from lamina.engine.locks import Hold
    from lamina.engine.mapping import Piece
    from lamina.engine.writer import Writer

TABLE_WORK = 1 << 17
"""Units whose table entries one zero or discard changes before memory may be relieved."""
ZEROES_AT_ONCE = 1 << 20
"""Bytes of zeroes that are written where tables cannot say them."""


class Clearing:
    """What a disk does where no data is written; ``writer`` does it where some has to be."""

    def __init__(self, disk: Disk, writer: Writer) -> None:
        self.disk = disk
        self.writer = writer

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Whole units by tables alone where the format can; the rest as data."""
        mapping = self.disk.mapping
        end = offset + length
        first = round_up(offset, mapping.unit)
        last = self._last_unit(end, mapping.unit)
        if first > last:
            # Within one unit.
            if length:
                self._zero_part(offset, end, flags)
            return
        for start, stop in self._zero_steps(first, last):
            if not self._zero_units(start, stop, flags):
                self._zero_slowly(start, min(stop, end), flags)
        if offset < first:
            self._zero_part(offset, first, flags)
        if last < end:
            self._zero_part(last, end, flags)

    def _last_unit(self, end: int, unit: int) -> int:
        """Where the last whole unit before ``end`` ends: the last one of the disk may be cut."""
        return round_up(end, unit) if end == self.disk.mapping.size else round_down(end, unit)

    def _zero_steps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Parts of whole units: many allocation units, or less than one."""
        unit = self.disk.allocation_unit
        while start < end:
            if start % unit or end - start < unit:
                stop = min(round_up(start + 1, unit), end)
            else:
                stop = min(start + unit * TABLE_WORK, round_down(end, unit))
            yield start, stop
            start = stop

    def _hold(self, start: int, end: int, *, writing: bool = False) -> Hold:
        """The allocation units of a range. Under the lock."""
        unit = self.disk.allocation_unit
        span = round_down(start, unit), round_up(end, unit)
        return self.disk.ranges.acquire([span], writing=writing)

    def _zero_units(self, start: int, end: int, flags: WriteFlags) -> bool:
        disk = self.disk
        with disk.lock:
            hold = self._hold(start, end)
        try:
            self._zero_raw(start, end, flags)
            with disk.lock:
                self.writer.open_gate()
                zeroed = disk.mapping.zero(
                    start, end - start, may_unmap=bool(flags & WriteFlags.MAY_UNMAP)
                )
                disk.metadata.relieve()
        finally:
            with disk.lock:
                disk.ranges.release(hold)
        return zeroed

    def _zero_raw(self, start: int, end: int, flags: WriteFlags) -> None:
        """What the tables are about to call zeroes, in the child that knows no tables."""
        mapping = self.disk.mapping
        node = mapping.raw_node
        end = min(end, mapping.size)
        if node is not None and start < end:
            node.write_zeroes(start, end - start, flags & ~WriteFlags.FUA)
            with self.disk.lock:
                self.disk.metadata.data_written(node)

    def _zero_part(self, offset: int, end: int, flags: WriteFlags) -> None:
        """A part of one unit: as a whole unit if the rest reads as zeroes already."""
        disk = self.disk
        mapping = disk.mapping
        start = round_down(offset, mapping.unit)
        stop = start + mapping.unit
        with disk.lock:
            hold = self._hold(start, stop)
            try:
                # Where tables are not everything, zeroes have to be written in any case.
                if (
                    mapping.raw_node is None
                    and self._reads_zero(start, offset)
                    and self._reads_zero(end, stop)
                ):
                    self.writer.open_gate()
                    if mapping.zero(start, stop - start, may_unmap=False):
                        return
            finally:
                disk.ranges.release(hold)
        self._zero_slowly(offset, end, flags)

    def _reads_zero(self, start: int, end: int) -> bool:
        # Nothing lies behind the end of the disk.
        end = min(end, self.disk.mapping.size)
        return start >= end or reads_zero(self.disk, start, end - start)

    def _zero_slowly(self, start: int, end: int, flags: WriteFlags) -> None:
        """Where tables cannot say it: in places of their own."""
        mapping = self.disk.mapping
        if mapping.request_alignment > 1 or mapping.encodes_always:
            # Encrypted or compressed zeroes are bytes like any others.
            self._write_zero_bytes(start, end, flags)
            return
        unit = self.disk.allocation_unit
        step = max(ROUND // unit, 1) * unit
        # The unit in which the backing file ends is written: what is zero there is so for its sake.
        inside_backing = round_up(self.disk.reader.inside_backing(), mapping.unit)
        for extent in self.disk.extents(start, end - start):
            at, stop = extent.guest_offset, extent.end
            if extent.kind is Kind.ZERO:
                continue
            if extent.kind is Kind.BELOW:
                stop = min(stop, inside_backing)
            while at < stop:
                part = min(round_down(at, unit) + step, stop)
                self._zero_places(at, part, flags)
                at = part

    def _write_zero_bytes(self, start: int, end: int, flags: WriteFlags) -> None:
        if flags & WriteFlags.NO_FALLBACK:
            raise ImageUnsupported("Operation not supported")
        # Not by way of the node: an aligner there may hold the range for this very request.
        zeroes = memoryview(bytes(min(end - start, ZEROES_AT_ONCE)))
        for offset in range(start, end, ZEROES_AT_ONCE):
            self.writer.write([(offset, zeroes[: min(ZEROES_AT_ONCE, end - offset)])])

    def _zero_places(self, start: int, end: int, flags: WriteFlags) -> None:
        """As a write would, but the storage makes the zeroes where the bytes are or will be."""
        disk = self.disk
        with disk.lock:
            hold = self._hold(start, end, writing=True)
            try:
                self.writer.open_gate()
                reservation = disk.mapping.reserve([(start, end - start)])
                copies = self.writer.plan_copies(reservation)
                if copies is None:
                    disk.ranges.share(hold)
                elif copies.any and flags & WriteFlags.NO_FALLBACK:
                    reservation.abort()
                    raise ImageUnsupported("Operation not supported")
            except BaseException:
                disk.ranges.release(hold)
                raise
        pieces = reservation.pieces
        self.writer.carry_out(
            hold, reservation, copies, lambda: self._zero_pieces(pieces, copies, flags)
        )

    def _zero_pieces(
        self, pieces: Sequence[Piece], copies: Copies | None, flags: WriteFlags
    ) -> None:
        """Copies as data; nothing at all where a place is there and reads as zeroes already."""
        batches: dict[Node, list[WriteRequest]] = {}
        for number, piece in enumerate(pieces):
            head, tail = copies.of(number) if copies is not None else ((), ())
            batch = batches.setdefault(piece.node, [])
            batch += place(piece.host_offset - piece.copy_head, head)
            batch += place(piece.host_offset + piece.length, tail)
        self.writer.send(batches)
        for piece in pieces:
            end = piece.host_offset + piece.length
            if not piece.reads_zero or end > piece.node.size:
                self.disk.file.event("write_aio")
                piece.node.write_zeroes(piece.host_offset, piece.length, flags & ~WriteFlags.FUA)

    def erase(self, start: int, end: int) -> None:
        """Zeroes over the data that this layer has there; what it has not stays below."""
        for extent in self.disk.extents(start, end - start) if start < end else ():
            if extent.kind not in (Kind.ZERO, Kind.BELOW):
                self._zero_slowly(extent.guest_offset, extent.end, WriteFlags.NONE)

    def discard(self, offset: int, length: int) -> None:
        """Whole units only: a hint about a part of one is ignored."""
        disk = self.disk
        unit = disk.mapping.discard_unit or disk.allocation_unit
        first = round_up(offset, unit)
        last = self._last_unit(offset + length, unit)
        step = unit * TABLE_WORK
        for start in range(first, last, step):
            end = min(start + step, last)
            with disk.lock:
                hold = disk.ranges.acquire([(start, end)], writing=False)
            try:
                self._zero_raw(start, end, WriteFlags.MAY_UNMAP)
                with disk.lock:
                    self.writer.open_gate()
                    disk.mapping.discard(start, end - start)
                    disk.metadata.relieve()
            finally:
                with disk.lock:
                    disk.ranges.release(hold)
