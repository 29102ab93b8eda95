"""Headers of replies, packed by servers: one class for each style of reply, with one interface.

A reply to a read is at its shortest one header and the data: ``data_header`` says how many bytes
``pack_data`` puts in front of them, so that a server can lay out a batch of replies, have the data
read between the headers, and send all of it in one go.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Style

SIMPLE = struct.Struct(">IIQ")
"""Magic, error, cookie."""
STRUCTURED = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length."""
EXTENDED = struct.Struct(">IHHQQQ")
"""Magic, flags, type, cookie, offset of the request, length."""
_STRUCTURED_DATA = struct.Struct(">IHHQIQ")
_EXTENDED_DATA = struct.Struct(">IHHQQQQ")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_OFFSET = struct.Struct(">Q")
_STATUS = struct.Struct(">I")
_STATUS_EXT = struct.Struct(">II")

StatusExtents = Sequence[tuple[int, int]]
"""Length in bytes and the value that a metadata context has there."""


class SimpleReplies:
    """No chunks: an error, or success and maybe data."""

    style = Style.SIMPLE
    data_header = SIMPLE.size

    def pack_data(
        self,
        buffer: bytearray | memoryview,
        at: int,
        cookie: int,
        request_offset: int,
        offset: int,
        length: int,
        *,
        done: bool = True,
    ) -> None:
        """Put the header of ``length`` bytes of the disk into ``buffer`` at ``at``."""
        SIMPLE.pack_into(buffer, at, nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    def success(self, cookie: int, request_offset: int) -> bytes:
        """The reply to anything but a read that brought data."""
        return SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    def nothing(self, cookie: int, request_offset: int) -> bytes:
        """The end of a reply to a read, or all of it where no byte was wanted."""
        return self.success(cookie, request_offset)

    def error(self, cookie: int, request_offset: int, number: int, message: str = "") -> bytes:
        """``number``: of the protocol, not of the host."""
        return SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, number, cookie)


class StructuredReplies(SimpleReplies):
    """Chunks. Extended ones have the offset of the request in their headers, and 64-bit numbers."""

    style = Style.STRUCTURED
    data_header = _STRUCTURED_DATA.size
    _extended = False

    def _chunk(
        self, kind: int, cookie: int, request_offset: int, payload: bytes, done: bool
    ) -> bytes:
        length = len(payload)
        if self._extended:
            magic = nbd.EXTENDED_REPLY_MAGIC
            head = EXTENDED.pack(magic, done, kind, cookie, request_offset, length)
        else:
            head = STRUCTURED.pack(nbd.STRUCTURED_REPLY_MAGIC, done, kind, cookie, length)
        return head + payload

    def pack_data(
        self,
        buffer: bytearray | memoryview,
        at: int,
        cookie: int,
        request_offset: int,
        offset: int,
        length: int,
        *,
        done: bool = True,
    ) -> None:
        kind, length = nbd.CHUNK_OFFSET_DATA, length + _OFFSET.size
        if self._extended:
            magic = nbd.EXTENDED_REPLY_MAGIC
            _EXTENDED_DATA.pack_into(
                buffer, at, magic, done, kind, cookie, request_offset, length, offset
            )
        else:
            magic = nbd.STRUCTURED_REPLY_MAGIC
            _STRUCTURED_DATA.pack_into(buffer, at, magic, done, kind, cookie, length, offset)

    def hole(
        self, cookie: int, request_offset: int, offset: int, length: int, *, done: bool = True
    ) -> bytes:
        """``length`` bytes of the disk are zeroes."""
        payload = _HOLE.pack(offset, length)
        return self._chunk(nbd.CHUNK_OFFSET_HOLE, cookie, request_offset, payload, done)

    def status(
        self,
        cookie: int,
        request_offset: int,
        context: int,
        extents: StatusExtents,
        *,
        done: bool = True,
    ) -> bytes:
        """What a metadata context says of consecutive extents; without extended headers each is
        shorter than 4 GiB."""
        values = [value for extent in extents for value in extent]
        if self._extended:
            kind, letter = nbd.CHUNK_BLOCK_STATUS_EXT, "Q"
            payload = _STATUS_EXT.pack(context, len(extents))
        else:
            kind, letter = nbd.CHUNK_BLOCK_STATUS, "I"
            payload = _STATUS.pack(context)
        payload += struct.pack(f">{len(values)}{letter}", *values)
        return self._chunk(kind, cookie, request_offset, payload, done)

    def nothing(self, cookie: int, request_offset: int) -> bytes:
        return self._chunk(nbd.CHUNK_NONE, cookie, request_offset, b"", True)

    def error(self, cookie: int, request_offset: int, number: int, message: str = "") -> bytes:
        text = message.encode("utf-8", "replace")[: nbd.MAX_STRING]
        payload = _ERROR.pack(number, len(text)) + text
        return self._chunk(nbd.CHUNK_ERROR, cookie, request_offset, payload, True)

    def error_at(
        self, cookie: int, request_offset: int, number: int, offset: int, *, done: bool = True
    ) -> bytes:
        """An error that concerns one place of the request."""
        payload = _ERROR.pack(number, 0) + _OFFSET.pack(offset)
        return self._chunk(nbd.CHUNK_ERROR_OFFSET, cookie, request_offset, payload, done)


class ExtendedReplies(StructuredReplies):
    style = Style.EXTENDED
    data_header = _EXTENDED_DATA.size
    _extended = True

    def success(self, cookie: int, request_offset: int) -> bytes:
        return self.nothing(cookie, request_offset)


def replies_of(style: Style) -> SimpleReplies:
    return (SimpleReplies, StructuredReplies, ExtendedReplies)[style]()
