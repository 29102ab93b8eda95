"""The client's side of the transmission phase: requests, and replies out of what arrives.

``pack_request`` makes headers; what is to be sent is a list of headers and the caller's own
buffers. ``ReplyReader`` says where the next bytes belong: headers and what is small go into a
buffer of its own, the data of reads straight into the buffers of the requests. A chunk is believed
only as far as it fits the request that it answers: nothing that a server sends is written anywhere
else, and a read that succeeds has had every byte of its buffer filled.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable

from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages, replies
from lamina.wire.nbd.agreement import Style
from lamina.wire.nbd.steps import ProtocolError
from lamina.wire.nbd.transmission_server import EXTENDED_REQUEST, REQUEST

_CAPACITY = 64 << 10
"""Bytes of a reader's own buffer."""
_MAX_STATUS = 8 + 16 * nbd.MAX_DESCRIPTORS
_MAX_ERROR = 6 + nbd.MAX_STRING + 8
_ZEROES = bytes(1 << 16)
_NOTHING = memoryview(b"")
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_STATUS = struct.Struct(">I")
_STATUS_EXT = struct.Struct(">II")


class Request:
    """One request, from being sent until it is answered."""

    __slots__ = (
        "answered",
        "buffer",
        "command",
        "cookie",
        "covered",
        "error",
        "filled",
        "flags",
        "length",
        "message",
        "offset",
        "owner",
        "status",
    )

    def __init__(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        buffer: memoryview | bytes | bytearray | None = None,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.buffer = buffer
        """READ: where the data go; WRITE: what is to be written; ``length`` bytes."""
        self.owner: object = None
        """Whoever waits for it; for the caller's own use."""
        self.reset()

    def reset(self) -> None:
        """As if it had never been sent."""
        self.cookie = 0
        self.answered = False
        self.error = 0
        """Of the protocol; 0: none so far."""
        self.message = ""
        """What the server says about the error, for people."""
        self.filled = 0
        """Bytes of a read that have come, in order from its beginning, as long as they do."""
        self.covered: list[tuple[int, int]] | None = None
        """Where they came in another order: ranges, sorted."""
        self.status: dict[int, list[tuple[int, int]]] = {}
        """BLOCK_STATUS: by context, lengths of consecutive extents and their values."""


def pack_request(request: Request, *, extended: bool) -> bytes:
    """The header; a write's buffer follows it."""
    if not extended:
        return REQUEST.pack(
            nbd.REQUEST_MAGIC,
            request.flags,
            request.command,
            request.cookie,
            request.offset,
            request.length,
        )
    flags = request.flags
    if request.command == nbd.CMD_WRITE:
        flags |= nbd.CMD_FLAG_PAYLOAD_LEN
    return EXTENDED_REQUEST.pack(
        nbd.EXTENDED_REQUEST_MAGIC,
        flags,
        request.command,
        request.cookie,
        request.offset,
        request.length,
    )


class ReplyReader:
    """``pending`` is the caller's: the requests that wait for an answer, by their cookies.

    Whatever raises ProtocolError leaves the reader useless: the connection has to be given up.
    """

    def __init__(self, style: Style, pending: dict[int, Request], contexts: set[int]) -> None:
        self._style = style
        self._pending = pending
        self._contexts = contexts
        self._buffer = memoryview(bytearray(_CAPACITY))
        self._start = 0
        self._end = 0
        self._target = _NOTHING
        """The part of a payload that has not come yet."""
        self._then: Callable[[], None] | None = None
        """What to do when it has."""
        self._finished: list[Request] = []

    def buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in this order."""
        if len(self._target):
            return [self._target, self._buffer]
        if self._start:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        return [self._buffer[self._end :]]

    def received(self, count: int) -> list[Request]:
        """So many bytes were put into the buffers: the requests that are answered now."""
        waiting = len(self._target)
        if waiting:
            taken = min(waiting, count)
            self._target = self._target[taken:]
            count -= taken
        self._end += count
        while True:
            if self._then is not None:
                if not self._fill():
                    break
                then, self._then, self._target = self._then, None, _NOTHING
                then()
            elif not self._header():
                break
        if self._start == self._end:
            self._start = self._end = 0
        # Buffers belong to the caller: nothing here holds on to them once they are filled.
        finished, self._finished = self._finished, []
        return finished

    def _fill(self) -> bool:
        """Move what there is of a payload to where it belongs; whether it is complete."""
        missing = len(self._target)
        if missing:
            taken = min(missing, self._end - self._start)
            if taken:
                start = self._start
                self._target[:taken] = self._buffer[start : start + taken]
                self._target = self._target[taken:]
                self._start += taken
        return taken == missing if missing else True

    # -- headers ---------------------------------------------------------------------------------

    def _header(self) -> bool:
        """Read the header of a message; whether there was one."""
        left = self._end - self._start
        if self._style is Style.EXTENDED:
            if left < replies.EXTENDED.size:
                return False
            magic, flags, kind, cookie, offset, length = replies.EXTENDED.unpack_from(
                self._buffer, self._start
            )
            if magic != nbd.EXTENDED_REPLY_MAGIC:
                raise ProtocolError(f"invalid magic (got 0x{magic:x})")
            self._start += replies.EXTENDED.size
            request = self._request(cookie)
            if request.offset != offset:
                raise ProtocolError("offset of a reply is not that of its request")
            self._chunk(request, flags, kind, length)
            return True
        if left < 4:
            return False
        magic = messages.U32.unpack_from(self._buffer, self._start)[0]
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            if left < replies.SIMPLE.size:
                return False
            _, error, cookie = replies.SIMPLE.unpack_from(self._buffer, self._start)
            self._start += replies.SIMPLE.size
            self._simple(self._request(cookie), error)
            return True
        if magic != nbd.STRUCTURED_REPLY_MAGIC or self._style is Style.SIMPLE:
            raise ProtocolError(f"invalid magic (got 0x{magic:x})")
        if left < replies.STRUCTURED.size:
            return False
        _, flags, kind, cookie, length = replies.STRUCTURED.unpack_from(self._buffer, self._start)
        self._start += replies.STRUCTURED.size
        self._chunk(self._request(cookie), flags, kind, length)
        return True

    def _request(self, cookie: int) -> Request:
        request = self._pending.get(cookie)
        if request is None:
            raise ProtocolError("unexpected reply: nobody asked")
        return request

    def _simple(self, request: Request, error: int) -> None:
        if request.command == nbd.CMD_BLOCK_STATUS and not error:
            raise ProtocolError("block status was not answered by chunks")
        request.error = error
        if request.command != nbd.CMD_READ:
            self._finish(request)
        elif self._style is not Style.SIMPLE:
            raise ProtocolError("protocol error: simple reply when structured reply chunk expected")
        elif error:
            self._finish(request)
        else:
            request.filled = request.length
            self._expect(self._part(request, 0, request.length), lambda: self._finish(request))

    # -- chunks ----------------------------------------------------------------------------------

    def _chunk(self, request: Request, flags: int, kind: int, length: int) -> None:
        done = bool(flags & nbd.REPLY_FLAG_DONE)
        if kind == nbd.CHUNK_OFFSET_DATA:
            self._data_chunk(request, length, done)
        elif kind == nbd.CHUNK_NONE:
            if length or not done:
                raise ProtocolError("protocol error: wrong end of a reply")
            self._finish(request)
        elif kind == nbd.CHUNK_OFFSET_HOLE:
            if request.command != nbd.CMD_READ or length != _HOLE.size:
                raise ProtocolError("protocol error: invalid chunk of type hole")
            self._gather(length, lambda payload: self._hole(request, payload, done))
        elif kind in (nbd.CHUNK_BLOCK_STATUS, nbd.CHUNK_BLOCK_STATUS_EXT):
            self._status_chunk(request, kind, length, done)
        elif kind & nbd.CHUNK_ERROR_BIT:
            if not _ERROR.size <= length <= _MAX_ERROR:
                raise ProtocolError("protocol error: invalid payload for an error chunk")
            self._gather(length, lambda payload: self._error(request, kind, payload, done))
        else:
            raise ProtocolError(f"Unexpected reply type {kind} in a chunk")

    def _data_chunk(self, request: Request, length: int, done: bool) -> None:
        if request.command != nbd.CMD_READ or length <= _OFFSET.size:
            raise ProtocolError("protocol error: invalid chunk of type data")
        length -= _OFFSET.size
        if length > request.length:
            raise ProtocolError("protocol error: server sent chunk exceeding requested region")

        def offset_is_known(payload: bytes) -> None:
            offset = _OFFSET.unpack(payload)[0] - request.offset
            self._cover(request, offset, length)
            self._expect(
                self._part(request, offset, length), lambda: self._after(request, done)
            )

        if self._end - self._start >= _OFFSET.size:  # nearly always
            start = self._start
            self._start += _OFFSET.size
            offset_is_known(bytes(self._buffer[start : self._start]))
        else:
            self._gather(_OFFSET.size, offset_is_known)

    def _hole(self, request: Request, payload: bytes, done: bool) -> None:
        offset, length = _HOLE.unpack(payload)
        offset -= request.offset
        if not length:
            raise ProtocolError("protocol error: server sent an empty hole")
        self._cover(request, offset, length)
        part = self._part(request, offset, length)
        for start in range(0, length, len(_ZEROES)):
            piece = part[start : start + len(_ZEROES)]
            piece[:] = _ZEROES[: len(piece)]
        self._after(request, done)

    def _cover(self, request: Request, offset: int, length: int) -> None:
        """Note that this part has come. Raises ProtocolError if it did before, or is none."""
        if offset < 0 or offset + length > request.length:
            raise ProtocolError("protocol error: server sent chunk exceeding requested region")
        if request.covered is None:
            if offset == request.filled:
                request.filled += length
                return
            request.covered = [(0, request.filled)] if request.filled else []
        ranges = request.covered
        at = bisect.bisect(ranges, (offset, 0))
        before = ranges[at - 1][1] if at else 0
        after = ranges[at][0] if at < len(ranges) else request.length
        if offset < before or offset + length > after:
            raise ProtocolError("protocol error: server sent the same part twice")
        ranges.insert(at, (offset, offset + length))
        request.filled += length

    def _status_chunk(self, request: Request, kind: int, length: int, done: bool) -> None:
        wide = kind == nbd.CHUNK_BLOCK_STATUS_EXT
        head, each = (8, 16) if wide else (4, 8)
        if wide and self._style is not Style.EXTENDED:
            raise ProtocolError("protocol error: wide block status without extended headers")
        if request.command != nbd.CMD_BLOCK_STATUS:
            raise ProtocolError("protocol error: block status nobody asked for")
        if length <= head or (length - head) % each or length > _MAX_STATUS:
            raise ProtocolError("protocol error: invalid payload for block status")
        self._gather(length, lambda payload: self._status(request, payload, wide, done))

    def _status(self, request: Request, payload: bytes, wide: bool, done: bool) -> None:
        if wide:
            context, count = _STATUS_EXT.unpack_from(payload)
            values = struct.unpack_from(f">{(len(payload) - 8) // 8}Q", payload, 8)
            if count and count != len(values) // 2:
                raise ProtocolError("protocol error: wrong number of block status descriptors")
        else:
            context = _STATUS.unpack_from(payload)[0]
            values = struct.unpack_from(f">{(len(payload) - 4) // 4}I", payload, 4)
        if context not in self._contexts:
            raise ProtocolError("protocol error: block status of an unexpected context id")
        if context in request.status:
            raise ProtocolError("protocol error: the same block status twice")
        extents = list(zip(values[::2], values[1::2], strict=True))
        if not all(values[::2]):
            raise ProtocolError("protocol error: server sent a zero-length extent")
        request.status[context] = extents
        self._after(request, done)

    def _error(self, request: Request, kind: int, payload: bytes, done: bool) -> None:
        number, length = _ERROR.unpack_from(payload)
        tail = _OFFSET.size if kind == nbd.CHUNK_ERROR_OFFSET else 0
        if not number:
            raise ProtocolError("protocol error: error chunk without an error")
        if length + _ERROR.size + tail > len(payload) or length > nbd.MAX_STRING:
            raise ProtocolError("protocol error: invalid payload for an error chunk")
        text = payload[_ERROR.size : _ERROR.size + length]
        if kind == nbd.CHUNK_ERROR_OFFSET:
            offset = _OFFSET.unpack_from(payload, _ERROR.size + length)[0]
            if not request.offset <= offset < request.offset + max(request.length, 1):
                raise ProtocolError("protocol error: error outside of the requested region")
        if not request.error:
            request.error, request.message = number, messages.printable(text)
        self._after(request, done)

    def _after(self, request: Request, done: bool) -> None:
        if done:
            self._finish(request)

    # -- payloads --------------------------------------------------------------------------------

    def _part(self, request: Request, offset: int, length: int) -> memoryview:
        if request.buffer is None:
            raise ProtocolError("protocol error: data nobody asked for")
        return memoryview(request.buffer)[offset : offset + length]

    def _expect(self, target: memoryview, then: Callable[[], None]) -> None:
        self._target, self._then = target, then

    def _gather(self, length: int, then: Callable[[bytes], None]) -> None:
        """A payload that is looked at here."""
        kept = bytearray(length)
        self._expect(memoryview(kept), lambda: then(bytes(kept)))

    def _finish(self, request: Request) -> None:
        if not request.error:
            if request.command == nbd.CMD_READ and request.filled != request.length:
                raise ProtocolError("protocol error: server did not send all of the data")
            if request.command == nbd.CMD_BLOCK_STATUS and not request.status:
                raise ProtocolError("protocol error: server sent no block status")
        del self._pending[request.cookie]
        request.answered = True
        self._finished.append(request)
