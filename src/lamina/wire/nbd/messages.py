"""Bytes and their meaning: the fixed parts of the messages of the handshake.

Everything is big-endian. What a peer sent is validated here; errors name the message and what is
wrong in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lamina.hints import NamedTuple
from lamina.records import dataclass
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.steps import ProtocolError

GREETING = struct.Struct(">QQH")
"""Both magics and the handshake flags."""
OLDSTYLE_REST = struct.Struct(">QI124x")
"""What follows the two magics of the old style: size, flags, reserved."""
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""Magic, option, length of the data."""
OPTION_REPLY = struct.Struct(">QIII")
"""Magic, option, type, length of the data."""
EXPORT = struct.Struct(">QH")
"""Size, transmission flags: the answer to EXPORT_NAME, and inside of INFO_EXPORT."""
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
_SIZES = struct.Struct(">III")

EXPORT_PADDING = 124
"""Zeroes behind the answer to EXPORT_NAME, unless both sides do without."""


@dataclass(frozen=True)
class BlockSizes:
    """What requests to an export must look like, in bytes (section "Block size constraints")."""

    minimum: int = 1
    """Offsets and lengths are multiples of it."""
    preferred: int = 4096
    maximum: int = nbd.MAX_PAYLOAD
    """Of the payload of one message; 0xffffffff: no limit."""


class QueryRequest(NamedTuple):
    """LIST_META_CONTEXT and SET_META_CONTEXT."""

    export: str
    queries: list[str]


class InfoRequest(NamedTuple):
    """INFO and GO."""

    export: str
    wanted: list[int]


class Malformed(Exception):
    """The data of an option make no sense; the text is for the peer."""


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(nbd.OPTION_MAGIC, number, len(data)) + data


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def string(text: str) -> bytes:
    """A string with its length in front."""
    data = text.encode("utf-8", "surrogateescape")
    return U32.pack(len(data)) + data


def text(data: bytes) -> str:
    """What a peer sent as a string; bytes that are no text survive a round trip."""
    return data.decode("utf-8", "surrogateescape")


def printable(data: bytes) -> str:
    """What a peer wants people to read: one line, nothing that drives a terminal."""
    shown = data[: nbd.MAX_STRING].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


# -- data of options -------------------------------------------------------------------------------


def pack_info_request(export: str, wanted: Sequence[int]) -> bytes:
    return string(export) + U16.pack(len(wanted)) + b"".join(U16.pack(one) for one in wanted)


def unpack_info_request(data: bytes) -> InfoRequest:
    """Raises Malformed."""
    export, at = _take_string(data, 0, "export name")
    if at + U16.size > len(data):
        raise Malformed("Inconsistent lengths")
    count = U16.unpack_from(data, at)[0]
    at += U16.size
    if len(data) - at != count * U16.size:
        raise Malformed("Inconsistent lengths")
    return InfoRequest(export, list(struct.unpack_from(f">{count}H", data, at)))


def pack_query_request(export: str, queries: Sequence[str]) -> bytes:
    return string(export) + U32.pack(len(queries)) + b"".join(string(one) for one in queries)


def unpack_query_request(data: bytes) -> QueryRequest:
    """Raises Malformed."""
    export, at = _take_string(data, 0, "export name")
    if at + U32.size > len(data):
        raise Malformed("Inconsistent lengths")
    count = U32.unpack_from(data, at)[0]
    at += U32.size
    if count > (len(data) - at) // U32.size:
        raise Malformed("Inconsistent lengths")
    queries = []
    for _ in range(count):
        query, at = _take_string(data, at, "query")
        queries.append(query)
    if at != len(data):
        raise Malformed("Inconsistent lengths")
    return QueryRequest(export, queries)


def _take_string(data: bytes, at: int, what: str) -> tuple[str, int]:
    if at + U32.size > len(data):
        raise Malformed("Inconsistent lengths")
    length = U32.unpack_from(data, at)[0]
    at += U32.size
    if length > nbd.MAX_STRING:
        raise Malformed(f"Invalid length of {what}")
    if at + length > len(data):
        raise Malformed("Inconsistent lengths")
    return text(data[at : at + length]), at + length


# -- data of replies -------------------------------------------------------------------------------


def pack_server(name: str, description: str) -> bytes:
    return string(name) + description.encode("utf-8", "surrogateescape")


def unpack_server(data: bytes) -> tuple[str, str]:
    """Name and description. Raises ProtocolError."""
    if len(data) < U32.size:
        raise ProtocolError("incorrect option length")
    length = U32.unpack_from(data)[0]
    if length > len(data) - U32.size:
        raise ProtocolError("incorrect option name length")
    if length > nbd.MAX_STRING:
        raise ProtocolError(f"export name too long {length}")
    end = U32.size + length
    if len(data) - end > nbd.MAX_STRING:
        raise ProtocolError(f"description too long {len(data) - end}")
    return text(data[U32.size : end]), text(data[end:])


def pack_info_export(size: int, flags: int) -> bytes:
    return U16.pack(nbd.INFO_EXPORT) + EXPORT.pack(size, flags)


def pack_info_text(kind: int, content: str) -> bytes:
    return U16.pack(kind) + content.encode("utf-8", "surrogateescape")


def pack_info_block_size(sizes: BlockSizes) -> bytes:
    return U16.pack(nbd.INFO_BLOCK_SIZE) + _SIZES.pack(
        sizes.minimum, sizes.preferred, sizes.maximum
    )


def unpack_info_export(data: bytes) -> tuple[int, int]:
    """Size and flags, out of what follows the type. Raises ProtocolError."""
    if len(data) != EXPORT.size:
        raise ProtocolError(f"remaining export info len {len(data)} is unexpected size")
    size, flags = EXPORT.unpack(data)
    return size, flags


def unpack_info_block_size(data: bytes) -> BlockSizes:
    """Raises ProtocolError."""
    if len(data) != _SIZES.size:
        raise ProtocolError(f"remaining block size info len {len(data)} is unexpected size")
    minimum, preferred, maximum = _SIZES.unpack(data)
    if minimum & (minimum - 1) or not minimum:
        raise ProtocolError(f"server minimum block size {minimum} is not a power of two")
    if minimum > 65536:
        raise ProtocolError(f"server minimum block size {minimum} is too large")
    if preferred & (preferred - 1) or preferred < minimum:
        raise ProtocolError(f"server preferred block size {preferred} is not valid")
    if maximum < minimum:
        raise ProtocolError(f"server maximum block size {maximum} is not valid")
    return BlockSizes(minimum, preferred, maximum)


def pack_meta_context(number: int, name: str) -> bytes:
    return U32.pack(number) + name.encode("utf-8", "surrogateescape")


def unpack_meta_context(data: bytes) -> tuple[int, str]:
    """Number and name. Raises ProtocolError."""
    if len(data) <= U32.size:
        raise ProtocolError("incorrect option length for metadata context")
    if len(data) - U32.size > nbd.MAX_STRING:
        raise ProtocolError("name of a metadata context too long")
    return U32.unpack_from(data)[0], text(data[U32.size :])
