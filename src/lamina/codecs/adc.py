"""Apple Data Compression: literals, and copies of what came before, told apart by their first byte.

    1nnnnnnn                        n + 1 bytes as they are
    01nnnnnn dddddddd dddddddd      n + 4 bytes from d + 1 bytes ago
    00nnnndd dddddddd               n + 3 bytes from d + 1 bytes ago
"""

from __future__ import annotations

import re

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.codecs import Data


_REPEATED = re.compile(rb"(?s:(...)\1*)")


def decode(encoded: Data, length: int) -> bytearray:
    """Exactly ``length`` bytes. Raises ImageCorrupt."""
    end = len(encoded)
    data = bytes(encoded) + b"\0\0\0"  # so that the last code can be looked at as a whole
    out = bytearray()
    at = size = 0
    while size < length and at < end:
        code = data[at]
        if code >= 0x80:
            start = at + 1
            at += code - 0x7E
            size += code - 0x7F
            out += data[start:at]
            continue
        if code >= 0x40:
            count = code - 0x3C
            distance = (data[at + 1] << 8 | data[at + 2]) + 1
            if data[at + 3] == code and (repeated := _REPEATED.match(data, at, end)):
                # The same copy again and again is a longer one.
                count = min(count * ((repeated.end() - at) // 3), length - size)
                at = repeated.end()
            else:
                at += 3
        else:
            count = (code >> 2) + 3
            distance = ((code & 3) << 8 | data[at + 1]) + 1
            at += 2
        start = size - distance
        if start < 0:
            raise _corrupt()
        size += count
        if distance >= count:
            out += out[start : start + count]
        else:
            out += (out[start:] * (count // distance + 1))[:count]
    if at > end or size < length:
        raise _corrupt()
    del out[length:]
    return out


def _corrupt() -> ImageCorrupt:
    return ImageCorrupt("Input/output error", structure="compressed data")
