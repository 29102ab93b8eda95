"""Replies to reads.

Short reads are laid out one after the other in one buffer, each behind its header, read in one
``readv`` and sent in one go. Long ones are answered piece by piece, so that none needs much memory:
zeroes as holes, and plain files straight from the host's cache to the socket.
"""

from __future__ import annotations

from lamina.block.extents import Kind
from lamina.block.status import chain_extents
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.replies import SimpleReplies, StructuredReplies

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.exports.nbd.carrier import Carrier
    from lamina.exports.nbd.export import Export
    from lamina.wire.nbd.transmission_server import Request

_CAPACITY = 1 << 20
"""Bytes of the buffer; the most that a piece of a long read has."""
_LONG = 64 << 10
"""Bytes from which on a read is worth a look at what it will find."""
_SHORTEST_HOLE = 4 << 10
_TOGETHER = 4
"""Short reads of local files that are answered in one go: while the client looks at the answers and
asks for more, the next ones are read. What is far away is asked for as a whole; and where several
clients keep the host busy, it is better to do as much as possible in one go."""
_PLAIN = frozenset({"raw", "file", "host_device", "host_cdrom"})
"""Drivers of disks whose bytes stay where they are."""


class Readings:
    def __init__(self, carrier: Carrier, export: Export, replies: SimpleReplies) -> None:
        self._carrier = carrier
        self._backend = export.backend
        self._replies = replies
        self._header = replies.data_header
        self._is_local = _is_local(export.backend.node)
        self._buffer = memoryview(bytearray(_CAPACITY + (64 << 10)))
        """Given to us by the host only as far as it is used."""

    def serve(self, requests: list[Request]) -> None:
        """Answer valid reads of at least one byte."""
        header, buffer = self._header, self._buffer
        pack = self._replies.pack_data
        together = len(requests)
        if together > _TOGETHER and self._is_local and self._carrier.alone():
            together = _TOGETHER
        waiting: list[Request] = []
        parts: list[tuple[int, memoryview]] = []
        at = 0
        for request in requests:
            cookie, offset, length = request[2:5]
            if (
                length >= _LONG
                or at + header + length > _CAPACITY
                or len(waiting) == together
            ):
                if waiting:
                    self._send(waiting, parts, at)
                    waiting, parts, at = [], [], 0
                if length >= _LONG:
                    self._long(request)
                    continue
            pack(buffer, at, cookie, offset, offset, length)
            at += header
            parts.append((offset, buffer[at : at + length]))
            at += length
            waiting.append(request)
        if waiting:
            self._send(waiting, parts, at)

    def _send(
        self, requests: list[Request], parts: list[tuple[int, memoryview]], end: int
    ) -> None:
        try:
            self._backend.readv(parts)
        except LaminaError as error:
            if len(requests) == 1:
                self._carrier.send_all(self._error(requests[0], error))
                return
            for request, (_, part) in zip(requests, parts, strict=True):
                self._alone(request, part)
            return
        self._carrier.send_all(self._buffer[:end])

    def _alone(self, request: Request, part: memoryview) -> None:
        try:
            self._backend.readv([(request.offset, part)])
        except LaminaError as error:
            self._carrier.send_all(self._error(request, error))
            return
        head = bytearray(self._header)
        self._replies.pack_data(
            head, 0, request.cookie, request.offset, request.offset, request.length
        )
        self._carrier.send_all(head, more=True)
        self._carrier.send_all(part)

    # -- long reads ------------------------------------------------------------------------------

    def _long(self, request: Request) -> None:
        replies = self._replies
        if not isinstance(replies, StructuredReplies) or request.flags & nbd.CMD_FLAG_DF:
            self._whole(request)
            return
        offset, end = request.offset, request.offset + request.length
        try:
            for start, length, is_zero, storage, place in self._pieces(offset, request.length):
                done = start + length == end
                if is_zero:
                    self._carrier.send_all(
                        replies.hole(request.cookie, offset, start, length, done=done),
                        more=not done,
                    )
                elif storage is None or not self._direct(request, start, length, storage, place):
                    self._copied(request, start, length, done=done)
                elif done:
                    self._carrier.send_all(replies.nothing(request.cookie, offset))
        except _ReadFailed as failed:
            self._carrier.send_all(self._error(request, failed.error))

    def _pieces(
        self, offset: int, length: int
    ) -> list[tuple[int, int, bool, Node | None, int]]:
        """Start, length, whether it is zero, and where it can be sent from (or None)."""
        node = self._backend.node
        plain = node.unfiltered.driver in _PLAIN
        found: list[tuple[int, int, bool, Node | None, int]] = []
        try:
            extents = chain_extents(node, offset, length, look_for_holes=False)
        except LaminaError as error:
            raise _ReadFailed(error) from None
        for extent, _, is_zero in extents:
            start, left = extent.guest_offset, extent.length
            is_zero = is_zero and left >= _SHORTEST_HOLE
            if is_zero:
                found.append((start, left, True, None, 0))
                continue
            storage = extent.node if plain and extent.kind == Kind.DATA else None
            while left:
                part = min(left, _CAPACITY)
                place = extent.host_offset + start - extent.guest_offset
                found.append((start, part, False, storage, place))
                start, left = start + part, left - part
        return found

    def _copied(self, request: Request, start: int, length: int, *, done: bool) -> None:
        """A piece of the disk through the buffer. Raises _ReadFailed before anything is sent."""
        header, buffer = self._header, self._buffer
        self._replies.pack_data(
            buffer, 0, request.cookie, request.offset, start, length, done=done
        )
        try:
            self._backend.readv([(start, buffer[header : header + length])])
        except LaminaError as error:
            raise _ReadFailed(error) from None
        self._carrier.send_all(buffer[: header + length], more=not done)

    def _direct(
        self, request: Request, start: int, length: int, storage: Node, place: int
    ) -> bool:
        """A piece from a file to the socket; False: nothing was sent.

        Something may go wrong after the header is out: so this is never the last chunk, and what
        cannot be sent is filled up before the error follows.
        """
        head = self._buffer[: self._header]
        self._replies.pack_data(
            head, 0, request.cookie, request.offset, start, length, done=False
        )
        if not storage.can_send:
            return False
        self._carrier.send_all(head, more=True)
        sent = self._carrier.send_from(storage, place, length)
        if sent == length:
            return True
        rest = self._buffer[: length - sent]
        failure = None
        try:
            self._backend.readv([(start + sent, rest)])
        except LaminaError as error:
            rest[:] = bytes(len(rest))
            failure = error
        self._carrier.send_all(rest)
        if failure is not None:
            raise _ReadFailed(failure)
        return True

    def _whole(self, request: Request) -> None:
        """All of it in one chunk, as it cannot be told afterwards that something went wrong."""
        header, length = self._header, request.length
        buffer = self._buffer
        if header + length > len(buffer):
            buffer = memoryview(bytearray(header + length))
        self._replies.pack_data(
            buffer, 0, request.cookie, request.offset, request.offset, length
        )
        try:
            self._backend.readv([(request.offset, buffer[header : header + length])])
        except LaminaError as error:
            self._carrier.send_all(self._error(request, error))
            return
        self._carrier.send_all(buffer[: header + length])

    def _error(self, request: Request, error: LaminaError) -> bytes:
        number = nbd.from_errno(error.errno)
        return self._replies.error(request.cookie, request.offset, number, str(error))


def _is_local(node: Node) -> bool:
    below = node.child("file")
    while below is not None:
        node, below = below, below.child("file")
    return node.can_send


class _ReadFailed(Exception):
    def __init__(self, error: LaminaError) -> None:
        super().__init__(str(error))
        self.error = error
