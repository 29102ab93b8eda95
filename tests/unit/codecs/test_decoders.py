"""Codecs that are only ever read: against those who write them, and against garbage."""

from __future__ import annotations

import bz2
import contextlib
import lzma
import random
import sys
import threading
import zlib

import lzfse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import decoder
from lamina.codecs import zlib_stream as zlib_stream_codec
from lamina.errors import ImageCorrupt, ImageUnsupported
from tests.unit.dmg.images import adc

ENCODERS = {
    "adc": adc,
    "bzip2": bz2.compress,
    "lzfse": lzfse.compress,
    "lzma": lzma.compress,
    "zlib-stream": zlib.compress,
}
CODECS = sorted(ENCODERS)


def samples(length: int) -> list[bytes]:
    rng = random.Random(length)
    words = [rng.randbytes(rng.randrange(1, 9)) for _ in range(50)]
    text = b"".join(rng.choices(words, k=length))[:length]
    return [bytes(length), text, rng.randbytes(length), (b"ab" * length)[:length]]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 512, 5000, 1 << 18])
def test_what_others_encode(codec: str, length: int) -> None:
    for data in samples(length):
        encoded = ENCODERS[codec](data)
        assert decoder(codec)(encoded, length) == data
        assert decoder(codec)(memoryview(bytearray(encoded)), length) == data
        assert decoder(codec)(encoded + b"\0" * 300, length) == data


@pytest.mark.parametrize("codec", sorted({*CODECS} - {"zlib-stream"}))
def test_no_more_than_the_unit(codec: str) -> None:
    data = samples(20_000)[1]
    assert decoder(codec)(ENCODERS[codec](data), 1000) == data[:1000]


@pytest.mark.parametrize("codec", CODECS)
def test_streams_that_end_early(codec: str) -> None:
    data = samples(20_000)[1]
    encoded = ENCODERS[codec](data)
    for length in (0, 1, 10, len(encoded) // 2, len(encoded) * 3 // 4):
        with pytest.raises(ImageCorrupt):
            decoder(codec)(encoded[:length], len(data))
    with pytest.raises(ImageCorrupt):
        decoder(codec)(encoded, len(data) + 1)


@given(garbage=st.binary(max_size=600), codec=st.sampled_from(CODECS))
@settings(max_examples=300, deadline=None)
def test_garbage(garbage: bytes, codec: str) -> None:
    with contextlib.suppress(ImageCorrupt):
        assert len(decoder(codec)(garbage, 4096)) == 4096


def test_damaged_streams() -> None:
    rng = random.Random(1)
    for codec in CODECS:
        for data in samples(4096):
            encoded = ENCODERS[codec](data)
            for _ in range(150):
                damaged = bytearray(encoded)
                for _ in range(rng.randrange(1, 4)):
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
                with contextlib.suppress(ImageCorrupt):
                    assert len(decoder(codec)(damaged, 4096)) == 4096


@pytest.mark.parametrize("codec", CODECS)
def test_threads(codec: str) -> None:
    data = samples(1 << 16)[1]
    encoded = ENCODERS[codec](data)
    wrong: list[int] = []

    def work() -> None:
        for number in range(5):
            if decoder(codec)(encoded, len(data)) != data:
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("encoded", "decoded"),
    [
        (b"\x82abc", b"abc"),
        (b"\x80a\x00\x00", b"aaaa"),
        (b"\x81ab\x3c\x01", b"ab" + b"ab" * 9),
        (b"\x80a\x40\x00\x00", b"aaaaa"),
        (b"\xff" + b"q" * 128 + b"\x7f\x00\x7f", b"q" * 195),
        (b"\x80a" + b"\x7f\x00\x00" * 1000, b"a" * 67_001),
        (b"\x81ab" + b"\x41\x00\x01" * 9 + b"\x80c", b"ab" * 23 + b"ac"),
        (b"\x80a" + b"\x7f\x00\x00" * 1000, b"a" * 50_000),
        (b"\xff" + b"q" * 127 + b"z" + (b"\xff" + b"r" * 128) * 8 + b"\x03\xff", None),
    ],
)
def test_adc_codes(encoded: bytes, decoded: bytes | None) -> None:
    if decoded is None:  # as far back as the short kind reaches
        decoded = b"q" * 127 + b"z" + b"r" * 1024 + b"r" * 3
    assert decoder("adc")(encoded, len(decoded)) == decoded


@pytest.mark.parametrize("encoded", [b"\x00\x00", b"\x80a\x00\x01", b"\x80a\x40\x00", b"\x85ab"])
def test_adc_nonsense(encoded: bytes) -> None:
    with pytest.raises(ImageCorrupt):
        decoder("adc")(encoded, 4)


def test_lzma_of_both_kinds() -> None:
    data = samples(5000)[1]
    alone = lzma.compress(data, lzma.FORMAT_ALONE)
    assert decoder("lzma")(alone, len(data)) == data


def test_an_lzma_dictionary_beyond_reason_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    encoded = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    stream = encoded.compress(b"x" * 512) + encoded.flush()
    with pytest.raises(ImageCorrupt):
        decoder("lzma")(stream, 512)


def test_zlib_without_the_fast_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib_stream_codec, "_fast_decode", None)
    for data in samples(5000):
        assert decoder("zlib-stream")(zlib.compress(data) + b"rest", 5000) == data
        with pytest.raises(ImageCorrupt):
            decoder("zlib-stream")(zlib.compress(data), 5001)


@pytest.mark.parametrize("fast", [True, False])
def test_zlib_checksums_count(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(zlib_stream_codec, "_fast_decode", None)
    data = samples(5000)[1]
    encoded = bytearray(zlib.compress(data))
    with pytest.raises(ImageCorrupt):
        decoder("zlib-stream")(encoded[:-1], 5000)
    encoded[-1] ^= 1
    with pytest.raises(ImageCorrupt):
        decoder("zlib-stream")(encoded, 5000)
    # One that goes on is not that of this unit.
    with pytest.raises(ImageCorrupt):
        decoder("zlib-stream")(zlib.compress(data), 4999)


def test_lzfse_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzfse", None)
    monkeypatch.delitem(sys.modules, "lamina.codecs.lzfse", raising=False)
    decoder.cache_clear()
    with pytest.raises(ImageUnsupported, match="needs a library that is not installed: lzfse"):
        decoder("lzfse")
    decoder.cache_clear()
