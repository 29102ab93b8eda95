"""The transmission phase of one connection.

What has arrived is served together: all reads of a batch are one ``readv``, all writes one
``writev``, and their replies leave in one piece. A failed batch is repeated request by request, so
that each gets its own answer; nothing is acknowledged before it is done.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.limits import WriteFlags
from lamina.errors import LaminaError, StorageError
from lamina.exports.nbd.reading import Readings
from lamina.hints import TYPE_CHECKING
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Agreement, Style
from lamina.wire.nbd.replies import StructuredReplies, replies_of
from lamina.wire.nbd.transmission_server import Request, RequestReader

if TYPE_CHECKING:
    from lamina.exports.nbd.carrier import Carrier
    from lamina.exports.nbd.export import Export

_LONGEST_COMPACT = (1 << 32) - (1 << 16)
"""Bytes of an extent in a block status reply with 32-bit lengths."""
_LONGEST = 1 << 62
_CHANGING = frozenset({nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES})
_FLAGS = {
    nbd.CMD_READ: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE: nbd.CMD_FLAG_FUA,
    nbd.CMD_DISC: nbd.CMD_FLAG_FUA,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO,
    nbd.CMD_BLOCK_STATUS: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_REQ_ONE,
}
"""The flags that each command may have; a read with structured replies has DF beside these."""


class _Wrong(Exception):
    """A request that is answered by an error of the protocol."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Transmission:
    def __init__(self, carrier: Carrier, export: Export, agreement: Agreement) -> None:
        self._carrier = carrier
        self._export = export
        self._backend = export.backend
        self._replies = replies_of(agreement.style)
        self._selected = sorted(agreement.contexts.values())
        """Numbers of the metadata contexts that the client chose."""
        extended = agreement.style is Style.EXTENDED
        self._longest = _LONGEST if extended else _LONGEST_COMPACT
        self._requests = RequestReader(extended=extended)
        self._read_flags = _FLAGS[nbd.CMD_READ]
        if agreement.style is not Style.SIMPLE:
            self._read_flags |= nbd.CMD_FLAG_DF
        self._write_flags = _FLAGS[nbd.CMD_WRITE]
        if extended:
            self._write_flags |= nbd.CMD_FLAG_PAYLOAD_LEN
        self._readings = Readings(carrier, export, self._replies)
        self._handlers: dict[int, Callable[[Request], bytes]] = {
            nbd.CMD_FLUSH: self._flush,
            nbd.CMD_TRIM: self._trim,
            nbd.CMD_CACHE: self._cache,
            nbd.CMD_WRITE_ZEROES: self._write_zeroes,
            nbd.CMD_BLOCK_STATUS: self._block_status,
        }

    def run(self, stopping: Callable[[], bool]) -> None:
        """Until the client leaves, or ``stopping`` says so between two batches.

        Raises ProtocolError or StorageError where the connection cannot go on.
        """
        requests, carrier = self._requests, self._carrier
        while not stopping():
            batch = requests.requests()
            if batch:
                if not self._serve(batch):
                    return
                requests.forget_large()
                continue
            count = carrier.receive_into(requests.buffers())
            if not count:
                if not requests.idle:
                    raise StorageError(
                        "Failed to read request: Unexpected end-of-file before all data were read"
                    )
                return
            requests.received(count)

    def _serve(self, batch: list[Request]) -> bool:
        """False: the client has said goodbye."""
        size, read_flags, write_flags = self._export.size, self._read_flags, self._write_flags
        writable = not self._export.read_only
        reads: list[Request] = []
        writes: list[Request] = []
        others: list[Request] = []
        out: list[bytes] = []
        going_on = True
        for request in batch:
            command = request.command
            if (
                command == nbd.CMD_READ
                and not request.flags & ~read_flags
                and 0 < request.length <= nbd.MAX_PAYLOAD
                and request.offset + request.length <= size
                and not request.fault
            ):
                reads.append(request)
                continue
            if (
                command == nbd.CMD_WRITE
                and not request.flags & ~write_flags
                and request.offset + request.length <= size
                and writable
                and not request.fault
            ):
                writes.append(request)  # nearly always one of these two
                continue
            if command == nbd.CMD_DISC:
                going_on = False
                break
            try:
                self._check(request)
            except _Wrong as wrong:
                out.append(self._error(request, wrong.number, str(wrong)))
                continue
            if command == nbd.CMD_WRITE:
                writes.append(request)
            elif command == nbd.CMD_READ:
                out.append(self._nothing_to_read(request))
            else:
                others.append(request)
        if writes:
            out += self._write(writes)
        for request in others:
            out.append(self._attempt(request, self._handlers[request.command]))
        if out:
            self._carrier.send_all(b"".join(out), more=bool(reads))
        if reads:
            self._readings.serve(reads)
        return going_on

    def _check(self, request: Request) -> None:
        """Raises _Wrong unless the request can be carried out."""
        command, flags, length = request.command, request.flags, request.length
        if command not in _FLAGS:
            raise _Wrong(nbd.EINVAL, f"invalid request type ({command}) received")
        if request.fault:
            if command == nbd.CMD_BLOCK_STATUS:
                raise _Wrong(request.fault, "CMD_BLOCK_STATUS payload not valid")
            if command == nbd.CMD_WRITE:
                raise _Wrong(request.fault, f"len ({length}) is larger than max len")
            raise _Wrong(request.fault, "unexpected payload")
        if command == nbd.CMD_READ:
            allowed = self._read_flags
        elif command == nbd.CMD_WRITE:
            allowed = self._write_flags
        else:
            allowed = _FLAGS[command]
            if request.contexts is not None:
                allowed |= nbd.CMD_FLAG_PAYLOAD_LEN
        if flags & ~allowed:
            name = nbd.COMMAND_NAMES[command]
            raise _Wrong(nbd.EINVAL, f"unsupported flags for command {name} (got 0x{flags:x})")
        if self._export.read_only and command in _CHANGING:
            raise _Wrong(nbd.EPERM, "Export is read-only")
        if command == nbd.CMD_FLUSH:
            return
        if command in (nbd.CMD_READ, nbd.CMD_CACHE) and length > nbd.MAX_PAYLOAD:
            raise _Wrong(
                nbd.EINVAL, f"len ({length}) is larger than max len ({nbd.MAX_PAYLOAD})"
            )
        if request.offset + length > self._export.size:
            writes = command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES)
            raise _Wrong(
                nbd.ENOSPC if writes else nbd.EINVAL,
                f"operation past EOF; From: {request.offset}, Len: {length}, "
                f"Size: {self._export.size}",
            )

    # -- commands --------------------------------------------------------------------------------

    def _write(self, requests: list[Request]) -> list[bytes]:
        if len(requests) > 1 and not any(one.flags & nbd.CMD_FLAG_FUA for one in requests):
            try:
                self._backend.writev([(one.offset, _payload(one)) for one in requests])
            except LaminaError:
                pass  # one after the other, to see which it was
            else:
                success = self._replies.success
                return [success(one.cookie, one.offset) for one in requests]
        return [self._attempt(one, self._write_one) for one in requests]

    def _write_one(self, request: Request) -> bytes:
        self._backend.write(request.offset, _payload(request), _write_flags(request))
        return self._success(request)

    def _flush(self, request: Request) -> bytes:
        self._backend.flush()
        return self._success(request)

    def _trim(self, request: Request) -> bytes:
        self._backend.discard(request.offset, request.length)
        if request.flags & nbd.CMD_FLAG_FUA:
            self._backend.flush()
        return self._success(request)

    def _cache(self, request: Request) -> bytes:
        self._backend.prefetch(request.offset, request.length)
        return self._success(request)

    def _write_zeroes(self, request: Request) -> bytes:
        flags = _write_flags(request)
        if not request.flags & nbd.CMD_FLAG_NO_HOLE:
            flags |= WriteFlags.MAY_UNMAP
        if request.flags & nbd.CMD_FLAG_FAST_ZERO:
            flags |= WriteFlags.NO_FALLBACK
        self._backend.write_zeroes(request.offset, request.length, flags)
        return self._success(request)

    def _block_status(self, request: Request) -> bytes:
        wanted = self._selected
        if request.contexts is not None:
            wanted = list(request.contexts)
            if not wanted or not set(wanted) <= set(self._selected):
                return self._error(request, nbd.EINVAL, "CMD_BLOCK_STATUS payload not valid")
        replies = self._replies
        if not wanted or not isinstance(replies, StructuredReplies):
            return self._error(request, nbd.EINVAL, "CMD_BLOCK_STATUS not negotiated")
        if not request.length:
            return self._error(request, nbd.EINVAL, "need non-zero length")
        only_one = bool(request.flags & nbd.CMD_FLAG_REQ_ONE)
        chunks = []
        for number in wanted:
            extents = self._export.contexts[number].status(
                request.offset, request.length, only_one=only_one, longest=self._longest
            )
            done = number == wanted[-1]
            chunks.append(
                replies.status(request.cookie, request.offset, number, extents, done=done)
            )
        return b"".join(chunks)

    # -- replies ---------------------------------------------------------------------------------

    def _attempt(self, request: Request, handler: Callable[[Request], bytes]) -> bytes:
        try:
            return handler(request)
        except LaminaError as error:
            return self._error(request, nbd.from_errno(error.errno), str(error))
        except MemoryError:
            return self._error(request, nbd.ENOMEM, "not enough memory")

    def _success(self, request: Request) -> bytes:
        return self._replies.success(request.cookie, request.offset)

    def _nothing_to_read(self, request: Request) -> bytes:
        return self._replies.nothing(request.cookie, request.offset)

    def _error(self, request: Request, number: int, message: str) -> bytes:
        return self._replies.error(request.cookie, request.offset, number, message)


def _payload(request: Request) -> memoryview:
    return memoryview(b"") if request.payload is None else request.payload


def _write_flags(request: Request) -> WriteFlags:
    return WriteFlags.FUA if request.flags & nbd.CMD_FLAG_FUA else WriteFlags.NONE
