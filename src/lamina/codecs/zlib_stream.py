"""Deflate with its usual wrapping (RFC 1950): a header and a checksum, one stream per unit."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from lamina.codecs.deflate import quickly
from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data


def _fast_decoder() -> Callable[[Data, int], bytes | bytearray] | None:
    """Something that raises for all that it cannot decode completely, or None."""
    try:
        from deflate import zlib_decompress
    except ImportError:
        return None
    return zlib_decompress


_fast_decode = _fast_decoder()


def decode(encoded: Data, length: int) -> bytes | bytearray:
    """Exactly ``length`` bytes, whose checksum is right; anything may follow the stream.

    Raises ImageCorrupt.
    """
    if (decoded := quickly(_fast_decode, encoded, length)) is not None:
        return decoded
    try:
        stream = zlib.decompressobj()
        # It looks at the checksum only where there is room for one byte more.
        found = stream.decompress(encoded, length + 1)
    except zlib.error as error:
        raise ImageCorrupt("Input/output error", structure="compressed data") from error
    if len(found) != length or not stream.eof:
        raise ImageCorrupt("Input/output error", structure="compressed data")
    return found
