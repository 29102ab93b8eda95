"""LZFSE streams, one per unit.

The library decodes into a buffer that it makes larger until everything fits, which a hostile stream
can drive far beyond any unit. The function underneath stops at the end of a buffer that it is
given, and lets the interpreter work meanwhile: so that is what is called.
"""

from __future__ import annotations

import ctypes

import lzfse

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data

try:
    _decode = ctypes.CDLL(lzfse.__file__).lzfse_decode_buffer
except AttributeError as error:
    raise ImportError("lzfse: no access to its decoder", name="lzfse") from error
_decode.restype = ctypes.c_size_t
_decode.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
]


def decode(encoded: Data, length: int) -> bytearray:
    """Exactly ``length`` bytes. Raises ImageCorrupt."""
    source = bytes(encoded)
    decoded = bytearray(length)
    if length:
        place = (ctypes.c_char * length).from_buffer(decoded)
        if _decode(place, length, source, len(source), None) != length:
            raise ImageCorrupt("Input/output error", structure="compressed data")
    return decoded
