"""Compressed grains of stream-optimized VMDKs: where they go, how long they are, and a zlib stream
(RFC 1950) that holds at most one grain.

Written without the first part, which only the writer of an image can know.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data

_MARKER = struct.Struct("<QI")


def _fast_decoder() -> Callable[[Data, int], bytes | bytearray] | None:
    """Something that raises for all that it cannot decode completely, or None."""
    try:
        from deflate import zlib_decompress
    except ImportError:
        return None
    return zlib_decompress


def _fast_encoder() -> Callable[[Data, int], bytes] | None:
    try:
        from isal import igzip_lib
    except ImportError:
        return None
    flag, compress = igzip_lib.COMP_ZLIB, igzip_lib.compress
    best: int = igzip_lib.ISAL_BEST_COMPRESSION

    def encode(data: Data, level: int) -> bytes:
        return compress(data, level=min(level, best), flag=flag, hist_bits=zlib.MAX_WBITS)

    return encode


_fast_decode = _fast_decoder()
_fast_encode = _fast_encoder()


def decode(encoded: Data, length: int) -> bytes | bytearray:
    """Exactly ``length`` bytes: what a short grain lacks is zero. Raises ImageCorrupt."""
    if len(encoded) < _MARKER.size:
        raise _corrupt()
    size = _MARKER.unpack_from(encoded)[1]
    stream = memoryview(encoded)[_MARKER.size : _MARKER.size + size]
    if len(stream) < size:
        raise _corrupt()
    decoded = _inflate(stream, length)
    if len(decoded) < length:
        decoded = decoded + bytes(length - len(decoded))
    return decoded


def _inflate(stream: memoryview, length: int) -> bytes | bytearray:
    if _fast_decode is not None:
        try:
            return _fast_decode(stream, length)
        except Exception:  # whatever it has against this stream, zlib decides
            pass
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(stream, length)
    except zlib.error as error:
        raise _corrupt() from error
    # A stream that ends early holds nobody knows what; one that goes on is not a grain's.
    if not decoder.eof and decoder.decompress(decoder.unconsumed_tail, 1):
        raise _corrupt()
    if not decoder.eof:
        raise _corrupt()
    return found


def encode(data: Data, level: int | None = None) -> bytes:
    """The zlib stream alone. Levels from 7 on are left to zlib, which compresses better there."""
    if _fast_encode is not None and (level is None or level <= 6):
        return _fast_encode(data, 3 if level is None else level // 2)
    return zlib.compress(data, -1 if level is None else level)


def _corrupt() -> ImageCorrupt:
    return ImageCorrupt("Input/output error", structure="compressed data")
