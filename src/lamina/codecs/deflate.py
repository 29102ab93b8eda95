"""Raw deflate (RFC 1951), without any header, as qcow2 and its kin store it.

Written with a window of 4 KiB, which is what the readers of these formats provide for. igzip does
that several times faster than zlib; libdeflate would be faster still, but knows no such limit.

Read by libdeflate, which wants the whole output in one go and a final block, and knows no
half-finished streams; what it refuses gets its chance with zlib, which reads as far as it needs to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data

WINDOW_BITS = 12
_MONOTONOUS = 128
"""Data that shrinks by more than this is looked at twice: that costs next to nothing."""


def _fast_decoder() -> Callable[[Data, int], bytes | bytearray] | None:
    """Something that raises for all that it cannot decode completely, or None."""
    try:
        from deflate import deflate_decompress
    except ImportError:
        return None
    return deflate_decompress


def _fast_encoder() -> Callable[[Data, int], bytes] | None:
    try:
        from isal import igzip_lib
    except ImportError:
        return None
    flag, compress = igzip_lib.COMP_DEFLATE, igzip_lib.compress
    best: int = igzip_lib.ISAL_BEST_COMPRESSION

    def encode(data: Data, level: int) -> bytes:
        return compress(data, level=min(level, best), flag=flag, hist_bits=WINDOW_BITS)

    return encode


_fast_decode = _fast_decoder()
_fast_encode = _fast_encoder()


def quickly(
    fast: Callable[[Data, int], bytes | bytearray] | None, encoded: Data, length: int
) -> bytes | bytearray | None:
    """What a quick decoder makes of a stream; None: it is for zlib to decide."""
    if fast is None:
        return None
    try:
        decoded = fast(encoded, length)
    except Exception:  # whatever it has against this stream
        return None
    return decoded if len(decoded) == length else None


def decode(encoded: Data, length: int) -> bytes | bytearray:
    """Exactly ``length`` bytes; the stream may go on, or be followed by anything.

    Raises ImageCorrupt.
    """
    if (decoded := quickly(_fast_decode, encoded, length)) is not None:
        return decoded
    try:
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(encoded, length)
    except zlib.error as error:
        raise ImageCorrupt("Input/output error", structure="compressed data") from error
    if len(found) != length:
        raise ImageCorrupt("Input/output error", structure="compressed data")
    return found


def encode(data: Data, level: int | None = None) -> bytes:
    """A complete stream. Levels from 7 on are left to zlib, which compresses better there."""
    if _fast_encode is not None and (level is None or level <= 6):
        encoded = _fast_encode(data, 3 if level is None else level // 2)
        if level is None and len(encoded) * _MONOTONOUS < len(data):
            # igzip's fixed tables are its best only for data that is hardly any.
            encoded = min(encoded, _fast_encode(data, 1), key=len)
        return encoded
    stream = zlib.compressobj(-1 if level is None else level, zlib.DEFLATED, -WINDOW_BITS)
    return stream.compress(data) + stream.flush()
