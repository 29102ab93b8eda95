"""The server's side of the transmission phase: requests out of what arrives.

One receive may bring many requests, or a part of one. ``RequestReader`` says where the next bytes
belong: into its own buffer, which takes headers and small payloads, and for the rest of a payload
that is larger than that into a buffer of its length. Payloads are handed out as views; they, and
the requests that hold them, are good until the reader is next asked for buffers.
"""

from __future__ import annotations

import struct
from mmap import mmap

from lamina.hints import NamedTuple
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.steps import ProtocolError

REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_EFFECT = struct.Struct(">Q")

CAPACITY = 256 << 10
"""Bytes of a reader's own buffer."""
_KEPT = 1 << 20
"""Bytes of the largest buffer for a payload that is kept for the next one."""


class Request(NamedTuple):
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    """Bytes of the export; for writes, those of the payload."""
    payload: memoryview | None = None
    fault: int = 0
    """Not 0: this error of the protocol is all that can be answered."""
    contexts: tuple[int, ...] | None = None
    """BLOCK_STATUS: the metadata contexts that are asked for; None: all that were selected."""


class RequestReader:
    """Raises ProtocolError where the peer cannot be understood any more."""

    def __init__(self, *, extended: bool, max_payload: int = nbd.MAX_PAYLOAD) -> None:
        self._header = EXTENDED_REQUEST if extended else REQUEST
        self._magic = nbd.EXTENDED_REQUEST_MAGIC if extended else nbd.REQUEST_MAGIC
        self._extended = extended
        self._max_payload = max_payload
        self._buffer = memoryview(bytearray(CAPACITY))
        self._start = 0
        self._end = 0
        self._large = memoryview(b"")
        self._large_request: Request | None = None
        self._missing = memoryview(b"")
        """The part of a large payload that has not come yet."""
        self._skip = 0
        """Bytes of a payload to throw away."""
        self._skipped: Request | None = None

    @property
    def idle(self) -> bool:
        """Whether the last byte that came was the last of a request."""
        return self._start == self._end and self._large_request is None and not self._skipped

    def buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in this order."""
        if self._start:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        own = self._buffer[self._end :]
        return [self._missing, own] if len(self._missing) else [own]

    def received(self, count: int) -> None:
        """So many bytes have been put into the buffers."""
        missing = len(self._missing)
        if missing:
            taken = min(missing, count)
            self._missing = self._missing[taken:]
            count -= taken
        self._end += count

    def requests(self) -> list[Request]:
        """All that are complete, up to and with one that has a buffer of its own."""
        found: list[Request] = []
        buffer, header = self._buffer, self._header
        size = header.size
        while True:
            if self._large_request is not None:
                if len(self._missing):
                    return found
                request = self._large_request._replace(payload=self._large)
                self._large_request = None
                found.append(request)
                return found
            if self._skipped is not None and not self._skip_some(found):
                return found
            self._take_usual(found)
            left = self._end - self._start
            if left < size:
                return found
            magic, flags, command, cookie, offset, length = header.unpack_from(buffer, self._start)
            if magic != self._magic:
                raise ProtocolError(f"invalid magic (got 0x{magic:x})")
            # QEMU's client sends the payload of a write without saying so in the flags.
            has_payload = command == nbd.CMD_WRITE or (
                self._extended and flags & nbd.CMD_FLAG_PAYLOAD_LEN
            )
            self._start += size
            request = Request(command, flags, cookie, offset, length)
            if not has_payload or not length:
                found.append(request)
                if command == nbd.CMD_DISC:
                    return found
                continue
            if length > self._max_payload:
                if self._extended:
                    raise ProtocolError(f"payload of {length} bytes is too long")
                self._skip, self._skipped = length, request._replace(fault=nbd.EINVAL)
            elif command == nbd.CMD_BLOCK_STATUS:
                if left - size < length <= CAPACITY - size:
                    self._start -= size
                    return found
                self._take_contexts(request, found)
            elif command != nbd.CMD_WRITE:
                self._skip, self._skipped = length, request._replace(fault=nbd.EINVAL)
            elif length <= CAPACITY - size:
                self._start -= size  # it comes with the next bytes
                return found
            elif found:
                self._start -= size  # the buffer for large payloads may still be in use
                return found
            else:
                self._begin_large(request)

    def _take_usual(self, found: list[Request]) -> None:
        """Reads, and writes whose payload is all there: nearly every request is one of these."""
        buffer, unpack, size = self._buffer, self._header.unpack_from, self._header.size
        start, end, longest = self._start, self._end, self._max_payload
        while end - start >= size:
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != self._magic:
                break
            if command == nbd.CMD_READ and not flags & nbd.CMD_FLAG_PAYLOAD_LEN:
                start += size
                found.append(Request(command, flags, cookie, offset, length))
            elif command == nbd.CMD_WRITE and 0 < length <= min(end - start - size, longest):
                payload = buffer[start + size : start + size + length]
                start += size + length
                found.append(Request(command, flags, cookie, offset, length, payload))
            else:
                break
        self._start = start

    def _skip_some(self, found: list[Request]) -> bool:
        """Throw away what there is of a payload that nobody wants; whether that was all."""
        taken = min(self._skip, self._end - self._start)
        self._start += taken
        self._skip -= taken
        if self._skip or self._skipped is None:
            return False
        found.append(self._skipped)
        self._skipped = None
        return True

    def _begin_large(self, request: Request) -> None:
        length = request.length
        if len(self._large) != length:
            # Memory that takes none before something has come.
            self._large = memoryview(mmap(-1, length))
        there = self._end - self._start
        self._large[:there] = self._buffer[self._start : self._end]
        self._start = self._end = 0
        self._missing = self._large[there:]
        self._large_request = request

    def forget_large(self) -> None:
        """The requests that were handed out are done: do not hold on to much memory."""
        if len(self._large) > _KEPT and self._large_request is None:
            self._large = memoryview(b"")

    def _take_contexts(self, request: Request, found: list[Request]) -> None:
        """BLOCK_STATUS with a payload: the length that is meant, and the contexts."""
        length = request.length
        if length > CAPACITY - self._header.size:
            self._skip, self._skipped = length, request._replace(fault=nbd.EINVAL)
            return
        payload = self._buffer[self._start : self._start + length]
        self._start += length
        count, rest = divmod(length - _EFFECT.size, 4)
        if count < 0 or rest:
            found.append(request._replace(fault=nbd.EINVAL))
            return
        effect = _EFFECT.unpack_from(payload)[0]
        contexts = struct.unpack_from(f">{count}I", payload, _EFFECT.size)
        if len(set(contexts)) != count:
            found.append(request._replace(length=effect, fault=nbd.EINVAL))
        else:
            found.append(request._replace(length=effect, contexts=contexts))
