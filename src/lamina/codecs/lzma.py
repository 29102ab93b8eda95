"""LZMA: .xz streams and those of the older .lzma kind, one per unit."""

from __future__ import annotations

from lzma import FORMAT_AUTO, LZMADecompressor, LZMAError

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data

MOST_MEMORY = 128 << 20
"""Bytes that a decoder may take, above all for its dictionary: twice what ``xz -9`` asks for."""


def decode(encoded: Data, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises ImageCorrupt."""
    try:
        decoded = LZMADecompressor(FORMAT_AUTO, MOST_MEMORY).decompress(encoded, length)
    except (LZMAError, EOFError, MemoryError) as error:
        raise ImageCorrupt("Input/output error", structure="compressed data") from error
    if len(decoded) != length:
        raise ImageCorrupt("Input/output error", structure="compressed data")
    return decoded
