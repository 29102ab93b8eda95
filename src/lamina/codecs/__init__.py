"""Codecs: bytes in, bytes out, one allocation unit at a time.

    decoder("zlib")(encoded, length)   exactly ``length`` bytes
    encoder("zstd")(data)              the encoded bytes, which may be longer than the data

A decoder takes what hostile or sloppy writers produce: bytes behind the end of the stream are
ignored, a stream that ends early or is no stream raises ImageCorrupt, and no more memory is spent
than the unit needs. Encoders and decoders may be used by several threads at once and release the
interpreter while they work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

from lamina.errors import ImageUnsupported

Data = bytes | bytearray | memoryview
Decoder = Callable[[Data, int], bytes | bytearray]
Encoder = Callable[[Data], bytes]

_MODULES = {
    "adc": "lamina.codecs.adc",
    "bzip2": "lamina.codecs.bzip2",
    "grain": "lamina.codecs.grain",
    "lzfse": "lamina.codecs.lzfse",
    "lzma": "lamina.codecs.lzma",
    "unreadable": "lamina.codecs.unreadable",
    "zlib": "lamina.codecs.deflate",
    "zlib-stream": "lamina.codecs.zlib_stream",
    "zstd": "lamina.codecs.zstd",
}
"""Each offers ``decode(encoded, length)`` and ``encode(data, level)``, or only the former."""


@cache
def decoder(name: str) -> Decoder:
    """Raises ImageUnsupported if there is no such codec or its library is missing."""
    decode: Decoder = _module(name).decode
    return decode


@cache
def encoder(name: str, level: int | None = None) -> Encoder:
    """``level``: None for the codec's own; larger is smaller and slower."""
    encode = _module(name).encode
    return lambda data: encode(data, level)


def _module(name: str) -> ModuleType:
    try:
        return import_module(_MODULES[name])
    except KeyError:
        raise ImageUnsupported(f"Unknown compression type '{name}'") from None
    except ImportError as error:
        raise ImageUnsupported(
            f"Compression type '{name}' needs a library that is not installed: {error.name}",
            hint=f"Install it with: pip install {error.name}",
        ) from error
