"""bzip2 streams, one per unit."""

from __future__ import annotations

import bz2

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data


def decode(encoded: Data, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises ImageCorrupt."""
    try:
        decoded = bz2.BZ2Decompressor().decompress(encoded, length)
    except (OSError, ValueError) as error:
        raise ImageCorrupt("Input/output error", structure="compressed data") from error
    if len(decoded) != length:
        raise ImageCorrupt("Input/output error", structure="compressed data")
    return decoded
