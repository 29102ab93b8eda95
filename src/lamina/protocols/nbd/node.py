"""The node of an NBD export."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from lamina.block.alignment import Aligner, fragments
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.errors import ImageUnsupported, Refused, StorageError
from lamina.hints import TYPE_CHECKING, ClassVar
from lamina.protocols.nbd.naming import uri
from lamina.units import SECTOR, round_down, round_up
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Style
from lamina.wire.nbd.transmission_client import Request

if TYPE_CHECKING:
    from lamina.block.sockets import SocketAddress
    from lamina.protocols.nbd.connections import Connections

_LONGEST_COMPACT = (1 << 32) - (1 << 16)
"""Bytes that a request without extended headers can speak of, in whole blocks of any size."""
_LONGEST = 1 << 62
_MOST_EXTENTS = 1 << 22
_LONGEST_READ = 1 << 20
"""Bytes that one request asks for. Servers make room for each, which is dear where it is large, and
read one while another is on its way."""
_MOST_ROUNDS = 1 << 14
"""Of one question about block status: what a server does not tell by then is taken for data."""


class NbdNode(Node):
    """Batches go to the server as they are, all of their requests in flight at once."""

    driver: ClassVar[str] = "nbd"

    def __init__(
        self,
        options: NodeOptions,
        connections: Connections,
        address: SocketAddress,
        *,
        is_bitmap: bool,
        secure: bool,
    ) -> None:
        """``is_bitmap``: block status is that of a dirty bitmap or another foreign context;
        ``secure``: the name that opens it begins with ``nbds``."""
        super().__init__(options)
        self._connections = connections
        self._address = address
        self._is_bitmap = is_bitmap
        self._secure = secure
        agreed = connections.agreement
        self._export = agreed.export
        self._flags = agreed.export.flags
        self._context = next(iter(agreed.contexts.values()), None)
        sizes = agreed.export.sizes
        longest = _LONGEST if agreed.style is Style.EXTENDED else _LONGEST_COMPACT
        self._limits = Limits(
            request_alignment=sizes.minimum,
            max_transfer=round_down(min(sizes.maximum, nbd.MAX_PAYLOAD), sizes.minimum),
            max_write_zeroes=longest,
            max_discard=longest,
            write_zeroes_alignment=sizes.minimum,
            discard_alignment=sizes.minimum,
            optimal_transfer=sizes.preferred,
        )
        self._longest = longest
        self._longest_read = min(self._limits.max_transfer, _LONGEST_READ)
        self._aligner = Aligner(self) if sizes.minimum > 1 else None

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """That of the export, rounded up to whole sectors; the rest reads as zeroes."""
        return round_up(self._export.size, SECTOR)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def filename(self) -> str:
        place = self._address
        name = None
        if not self._is_bitmap:
            name = uri(
                place.type,
                place.host,
                place.port,
                place.path,
                self._export.name,
                secure=self._secure,
            )
        return name or self.options.filename

    def info(self) -> NodeInfo:
        return NodeInfo(self.filename, self.driver, self.size, dirty=None)

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        if self._aligner is not None:
            self._aligner.readv(requests)
        else:
            self.aligned_readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        size = self._export.size
        if any(offset + len(data) > size for offset, data in requests):
            raise StorageError.from_errno(errno.ENOSPC)
        if self._aligner is not None:
            self._aligner.writev(requests, flags)
        else:
            self.aligned_writev(requests, flags)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        if offset + length > self._export.size:
            raise StorageError.from_errno(errno.ENOSPC)
        if self._aligner is not None:
            self._aligner.write_zeroes(offset, length, flags)
        else:
            self.aligned_write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        length = min(length, self._export.size - offset)
        if self._aligner is not None:
            self._aligner.discard(offset, length)
        else:
            self.aligned_discard(offset, length)

    def _flush(self) -> None:
        if self._flags & nbd.SEND_FLUSH:
            self._run([Request(nbd.CMD_FLUSH)])

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None:
        end = self._export.size
        if end % SECTOR and any(offset + len(buffer) > end for offset, buffer in requests):
            requests = [self._inside(offset, buffer) for offset, buffer in requests]
        self._run(
            [
                Request(nbd.CMD_READ, offset, len(buffer), buffer=buffer)
                for offset, buffer in fragments(requests, self._longest_read)
                if len(buffer)
            ]
        )

    def prefetch(self, offset: int, length: int) -> None:
        """Asks the server to; one that does not know how to is made to by reading."""
        if not self._flags & nbd.SEND_CACHE:
            super().prefetch(offset, length)
            return
        block = self._limits.request_alignment
        start = round_down(offset, block)
        end = min(round_up(offset + length, block), self._export.size)
        step = self._limits.max_transfer  # servers bound it, though there is no payload
        self._run(
            [
                Request(nbd.CMD_CACHE, at, min(step, end - at))
                for at in range(start, end, step)
            ]
        )

    def _inside(self, offset: int, buffer: memoryview) -> ReadRequest:
        """What of a read the export has; the rest is filled with zeroes."""
        inside = max(min(len(buffer), self._export.size - offset), 0)
        buffer[inside:] = bytes(len(buffer) - inside)
        return offset, buffer[:inside]

    def aligned_writev(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        self._check_writable()
        wire_flags = self._fua(flags)
        self._run(
            [
                Request(nbd.CMD_WRITE, offset, len(data), flags=wire_flags, buffer=data)
                for offset, data in fragments(requests, self._limits.max_transfer)
                if len(data)
            ]
        )
        if flags & WriteFlags.FUA and not wire_flags:
            self.flush()

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self._check_writable()
        quickly = bool(flags & WriteFlags.NO_FALLBACK)
        if not self._flags & nbd.SEND_WRITE_ZEROES or (
            quickly and not self._flags & nbd.SEND_FAST_ZERO
        ):
            if quickly:
                raise ImageUnsupported("Operation not supported")
            self.write_zero_bytes(offset, length, flags)
            return
        wire_flags = self._fua(flags)
        if not flags & WriteFlags.MAY_UNMAP:
            wire_flags |= nbd.CMD_FLAG_NO_HOLE
        if quickly:
            wire_flags |= nbd.CMD_FLAG_FAST_ZERO
        self._run(self._ranges(nbd.CMD_WRITE_ZEROES, offset, length, wire_flags))
        if flags & WriteFlags.FUA and not wire_flags & nbd.CMD_FLAG_FUA:
            self.flush()

    def write_zero_bytes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Below the aligner: the range is in our hands already."""
        chunk = memoryview(bytes(min(length, 1 << 20)))
        end = offset + length
        for start in range(offset, end, 1 << 20):
            self.aligned_writev([(start, chunk[: end - start])], flags & WriteFlags.FUA)

    def aligned_discard(self, offset: int, length: int) -> None:
        if self._flags & nbd.SEND_TRIM and not self.read_only:
            self._run(self._ranges(nbd.CMD_TRIM, offset, length, 0))

    def _ranges(self, command: int, offset: int, length: int, flags: int) -> list[Request]:
        end = offset + length
        return [
            Request(command, start, min(self._longest, end - start), flags=flags)
            for start in range(offset, end, self._longest)
        ]

    def _fua(self, flags: WriteFlags) -> int:
        wanted = flags & WriteFlags.FUA and not self.options.no_flush
        return nbd.CMD_FLAG_FUA if wanted and self._flags & nbd.SEND_FUA else 0

    def _check_writable(self) -> None:
        if self._flags & nbd.READ_ONLY:
            raise Refused("NBD export is read-only", errno=errno.EACCES)

    def _run(self, requests: list[Request]) -> None:
        self._connections.run(requests)
        for request in requests:
            if request.error:
                raise _failure(request)

    # -- block status ----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> list[Extent]:
        if self._context is None:
            return [Extent(offset, length, Kind.DATA, self, offset)]
        found: list[Extent] = []
        block = self._limits.request_alignment
        behind = offset + length
        end = min(behind, self._export.size)
        rounds = 0
        while offset < end:
            rounds += 1
            if rounds > _MOST_ROUNDS or len(found) > _MOST_EXTENTS:
                self._append(found, offset, end - offset, 0)
                offset = end
                break
            start = round_down(offset, block)
            asked = min(round_up(end, block) - start, self._longest)
            request = Request(nbd.CMD_BLOCK_STATUS, start, asked)
            self._run([request])
            answer = request.status.get(self._context)
            if answer is None:
                raise StorageError("protocol error: no block status", errno=errno.EIO)
            for extent_length, value in answer:
                stop = min(start + extent_length, end)
                if stop > offset:
                    self._append(found, offset, stop - offset, value)
                    offset = stop
                start += extent_length
        if offset < behind:
            found.append(Extent(offset, behind - offset, Kind.ZERO, self, offset))
        return found

    def _append(self, found: list[Extent], offset: int, length: int, value: int) -> None:
        one = Extent(offset, length, Kind.DATA, self, offset)
        if value & nbd.STATE_ZERO:
            stored = 0 if value & nbd.STATE_HOLE else length
            one = one._replace(kind=Kind.ZERO, stored_length=stored)
        elif value & nbd.STATE_HOLE and self._is_bitmap:
            # As QEMU has it: what is dirty is shown as absent.
            one = Extent(offset, length, Kind.BELOW, self)
        last = found[-1] if found else None
        alike = last is not None and (last.kind, bool(last.stored_length)) == (
            one.kind,
            bool(one.stored_length),
        )
        if last is not None and alike and last.end == offset:
            stored = last.stored_length + one.stored_length
            found[-1] = last._replace(length=last.length + length, stored_length=stored)
        else:
            found.append(one)

    # -- size and life ---------------------------------------------------------------------------

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        if exact and size != self.size:
            raise ImageUnsupported("Cannot resize NBD nodes")
        if size > self.size:
            raise ImageUnsupported("Cannot grow NBD nodes")

    def reopen(self, *, read_only: bool) -> None:
        if not read_only:
            self._check_writable()
        super().reopen(read_only=read_only)

    def _close(self) -> None:
        try:
            if not self.read_only:
                self.flush()
        finally:
            self._connections.close()


def _failure(request: Request) -> StorageError:
    return StorageError.from_errno(nbd.to_errno(request.error))
