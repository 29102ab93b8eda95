"""Writing in two phases: reserve places, move the bytes, publish.

A batch is sorted, cut into rounds in which no allocation unit is touched twice, and each round goes

    lock    wait for the ranges, ``mapping.reserve``, plan the copies
    unlock  read what must be copied, write copies and data as one batch per node
    lock    ``commit`` (or ``abort``), release the ranges

so that the lock is never held while guest data moves, and nothing is published before its data is
written. A batch whose places are all allocated already is one write and nothing else.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from lamina.engine.batches import ROUND, Payload, chunks, layout, merged, offset_of, place, rounds
from lamina.engine.copies import Copies
from lamina.engine.workers import run_all
from lamina.errors import StorageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node, WriteRequest
    from lamina.engine.disk import Disk
    from lamina.engine.locks import Hold, Spans
    from lamina.engine.mapping import Piece, Reservation

ENCODE_AHEAD = 16 << 20
"""Bytes of units that one compressed write encodes at a time."""
ENCRYPT_STEP = 1 << 20
"""Bytes that are encrypted with one call."""
ENCRYPT_AHEAD = 4 << 20
"""Bytes of encrypted copies that are held before they are written."""


class Writer:
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._gate_open = False

    def open_gate(self) -> None:
        """Before every change, under the lock: the format's preparations for the first one."""
        if not self._gate_open:
            self.disk.mapping.before_first_write()
            self._gate_open = True

    def close_gate(self) -> None:
        """The next change is the first one again."""
        self._gate_open = False

    # -- plain writes ----------------------------------------------------------------------------

    def write(self, requests: Sequence[WriteRequest]) -> None:
        mapping = self.disk.mapping
        if mapping.encodes_always:
            self.write_compressed(requests)
            return
        unit = mapping.allocation_unit or mapping.unit
        if len(requests) == 1 and len(requests[0][1]):
            offset, data = requests[0]
            end = offset + len(data)
            self._write_round(requests, [(offset // unit * unit, -(-end // unit) * unit)])
            return
        requests = sorted([request for request in requests if len(request[1])], key=offset_of)
        if not requests:
            return
        units, overlapping, sharing = layout(requests, unit)
        crowded = sharing or len(requests) * unit > ROUND
        if overlapping or not self._write_round(requests, units, in_place_only=crowded):
            for part in rounds(requests, unit):
                self._write_round(part, layout(part, unit)[0])

    def _write_round(
        self,
        requests: Sequence[WriteRequest],
        units: Spans,
        *,
        in_place_only: bool = False,
    ) -> bool:
        """Write requests that are in order and share no unit unless they adjoin.

        ``units``: what they touch. ``in_place_only``: they may share units; nothing is done, and
        False returned, unless all of their places are allocated.
        """
        disk = self.disk
        mapping = disk.mapping
        with disk.lock:
            hold = disk.ranges.acquire(units, writing=True)
            try:
                if not self._gate_open:
                    self.open_gate()
                places = mapping.locate_for_writing(requests)
                if places is not None and -1 not in places:
                    reservation = None
                    disk.ranges.share(hold)
                elif in_place_only:
                    disk.ranges.release(hold)
                    return False
                else:
                    reservation = mapping.reserve(merged(requests))
                    copies = self.plan_copies(reservation)
                    if copies is None:
                        disk.ranges.share(hold)
            except BaseException:
                disk.ranges.release(hold)
                raise
        if reservation is None:
            assert places is not None
            try:
                self._write_places(places, requests)
            finally:
                with disk.lock:
                    disk.ranges.release(hold)
            return True
        pieces = reservation.pieces
        self.carry_out(
            hold, reservation, copies, lambda: self._write_pieces(pieces, requests, copies)
        )
        return True

    def carry_out(
        self, hold: Hold, reservation: Reservation, copies: Copies | None, move: Callable[[], None]
    ) -> None:
        """Fill what was reserved, then publish it; the hold ends with it."""
        disk = self.disk
        done = False
        try:
            if copies is not None and copies.any:
                copies.read()
                disk.file.event("cow_write")
            move()
            done = True
        finally:
            with disk.lock:
                try:
                    self._conclude(reservation, done)
                finally:
                    disk.ranges.release(hold)

    def _write_places(self, places: Sequence[int], requests: Sequence[WriteRequest]) -> None:
        """Requests that have one place each, known to be theirs."""
        disk = self.disk
        disk.file.event("write_aio")
        writev = disk.mapping.data_node.writev
        if len(places) == 1:
            writev([(places[0], requests[0][1])])
        else:
            writev([(place, request[1]) for place, request in zip(places, requests, strict=False)])

    def plan_copies(self, reservation: Reservation) -> Copies | None:
        """What the pieces want copied; None if all of them are written in place."""
        if not any(piece.fresh for piece in reservation.pieces):
            return None
        try:
            return Copies(self.disk, reservation.pieces)
        except BaseException:
            reservation.abort()
            raise

    def _conclude(self, reservation: Reservation, done: bool) -> None:
        """Commit or abort, under the lock."""
        if not done:
            reservation.abort()
            return
        metadata = self.disk.metadata
        fresh = {piece.node for piece in reservation.pieces if piece.fresh}
        for node in fresh:
            metadata.data_written(node)
        reservation.commit()
        metadata.relieve()

    def _write_pieces(
        self, pieces: Sequence[Piece], requests: Sequence[WriteRequest], copies: Copies | None
    ) -> None:
        """Everything that the pieces want written, as one batch per node."""
        batches: dict[Node, list[WriteRequest]] = {}
        payload = Payload(requests)
        encrypted = 0
        for number, piece in enumerate(pieces):
            batch = batches.setdefault(piece.node, [])
            host = piece.host_offset
            head, tail = copies.of(number) if copies is not None else ((), ())
            if piece.cipher is None:
                batch += place(host - piece.copy_head, head)
                batch += place(host, payload.take(piece.guest_offset, piece.length))
                batch += place(host + piece.length, tail)
                continue
            parts = [*head, *payload.take(piece.guest_offset, piece.length), *tail]
            sector = piece.first_sector
            host -= piece.copy_head
            for chunk in chunks(parts, ENCRYPT_STEP):
                piece.cipher.encrypt(memoryview(chunk), sector)
                batch.append((host, chunk))
                sector += len(chunk) // 512
                host += len(chunk)
                encrypted += len(chunk)
                if encrypted >= ENCRYPT_AHEAD:
                    self.send(batches)
                    batch = batches.setdefault(piece.node, [])
                    encrypted = 0
        self.send(batches)

    def send(self, batches: dict[Node, list[WriteRequest]]) -> None:
        for node, batch in batches.items():
            if batch:
                self.disk.file.event("write_aio")
                node.writev(batch)
        batches.clear()

    # -- compressed writes -----------------------------------------------------------------------

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        """Whole units; those that do not shrink are stored plain where the format has that.

        Raises StorageError (EINVAL).
        """
        mapping = self.disk.mapping
        unit = mapping.encoded_unit
        units: list[WriteRequest] = []
        for offset, data in sorted(requests, key=offset_of):
            end = offset + len(data)
            if offset % unit or (end % unit and end != mapping.size):
                raise StorageError.from_errno(errno.EINVAL)
            view = memoryview(data)
            for skip in range(0, len(view), unit):
                units.append((offset + skip, view[skip : skip + unit]))
        step = max(ENCODE_AHEAD // unit, 1)
        for start in range(0, len(units), step):
            self._write_units(units[start : start + step])

    def _write_units(self, units: Sequence[WriteRequest]) -> None:
        from lamina.codecs import encoder

        mapping = self.disk.mapping
        encode = encoder(mapping.codec)
        results: dict[int, bytes] = {}

        def encode_unit(unit: WriteRequest) -> None:
            offset, data = unit
            if len(data) < mapping.encoded_unit:
                data = bytes(data).ljust(mapping.encoded_unit, b"\0")
            results[offset] = mapping.framed(offset, encode(data))

        run_all(encode_unit, units)
        longest = sys.maxsize if mapping.encodes_always else mapping.encoded_unit - 1
        shrunk = [
            (offset, results[offset]) for offset, _ in units if len(results[offset]) <= longest
        ]
        if shrunk:
            self._write_encoded(shrunk)
        plain = [unit for unit in units if len(results[unit[0]]) > longest]
        if plain:
            self.write(plain)

    def _write_encoded(self, units: Sequence[tuple[int, bytes]]) -> None:
        disk = self.disk
        mapping = disk.mapping
        unit = mapping.encoded_unit
        with disk.lock:
            hold = disk.ranges.acquire(
                [(offset, offset + unit) for offset, _ in units], writing=False
            )
            try:
                self.open_gate()
                reservation = mapping.reserve_encoded(
                    [(offset, len(encoded)) for offset, encoded in units]
                )
            except BaseException:
                disk.ranges.release(hold)
                raise
        done = False
        try:
            # The places may have held other units before.
            disk.units.forget()
            batches: dict[Node, list[WriteRequest]] = {}
            for piece, (_, encoded) in zip(reservation.pieces, units, strict=True):
                batches.setdefault(piece.node, []).append((piece.host_offset, encoded))
            for node, batch in batches.items():
                disk.file.event("write_compressed")
                node.writev(batch)
            done = True
        finally:
            with disk.lock:
                try:
                    self._conclude(reservation, done)
                finally:
                    disk.ranges.release(hold)
