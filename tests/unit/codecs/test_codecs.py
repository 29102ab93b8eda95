"""Codecs against the libraries that real readers and writers use, and against garbage."""

from __future__ import annotations

import contextlib
import random
import threading
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import decoder, encoder
from lamina.codecs import deflate as deflate_codec
from lamina.errors import ImageCorrupt, ImageUnsupported

CODECS = ["zlib", "zstd"]
UNIT = 1 << 16


def sample(seed: int, length: int = UNIT) -> bytes:
    """Compressible, with repetitions far apart: 5000 bytes lie between equal parts."""
    rng = random.Random(seed)
    block = rng.randbytes(5000)
    return (block * (length // len(block) + 1))[:length]


def mixed(seed: int, length: int = UNIT) -> bytes:
    rng = random.Random(seed)
    return b"".join(rng.choice([b"\0" * 64, rng.randbytes(16), b"text "]) for _ in range(length))[
        :length
    ]


@pytest.fixture(params=["fast", "fallback"])
def _deflate_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fast libraries and without them."""
    if request.param == "fallback":
        monkeypatch.setattr(deflate_codec, "_fast_decode", None)
        monkeypatch.setattr(deflate_codec, "_fast_encode", None)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [512, 4096, UNIT, 1 << 21])
def test_round_trip(codec: str, length: int) -> None:
    for data in (bytes(length), mixed(1, length), random.Random(2).randbytes(length)):
        assert decoder(codec)(encoder(codec)(data), length) == data


@pytest.mark.usefixtures("_deflate_library")
@pytest.mark.parametrize("level", [None, 1, 6, 9])
def test_readers_with_a_window_of_4_kib_read_our_deflate(level: int | None) -> None:
    """Matches further back than that would fail with a 12-bit window."""
    for data in (sample(3), mixed(4), bytes(UNIT)):
        inflate = zlib.decompressobj(-12)
        assert inflate.decompress(encoder("zlib", level)(data)) == data
        assert inflate.eof


@pytest.mark.usefixtures("_deflate_library")
@pytest.mark.parametrize("wbits", [-9, -12, -15])
@pytest.mark.parametrize("trailing", [b"", b"\0" * 511, b"\xff" * 300])
def test_any_window_and_anything_behind_the_stream(wbits: int, trailing: bytes) -> None:
    data = sample(5)
    stream = zlib.compressobj(9, zlib.DEFLATED, wbits)
    encoded = stream.compress(data) + stream.flush()
    assert decoder("zlib")(encoded + trailing, UNIT) == data
    assert decoder("zlib")(memoryview(bytearray(encoded + trailing)), UNIT) == data


@pytest.mark.usefixtures("_deflate_library")
def test_deflate_stops_at_the_end_of_the_unit() -> None:
    data = mixed(6)
    longer = zlib.compressobj(wbits=-12)
    assert decoder("zlib")(longer.compress(data + b"more") + longer.flush(), UNIT) == data
    unfinished = zlib.compressobj(wbits=-12)
    encoded = unfinished.compress(data) + unfinished.flush(zlib.Z_SYNC_FLUSH)
    assert decoder("zlib")(encoded, UNIT) == data


@pytest.mark.parametrize("content_size", [True, False])
def test_zstd_frames_of_other_writers(content_size: bool) -> None:
    data = mixed(7)
    writer = zstandard.ZstdCompressor(write_content_size=content_size).compressobj()
    frame = writer.compress(data) + writer.flush()
    assert decoder("zstd")(frame + b"\0" * 300, UNIT) == data
    longer = zstandard.ZstdCompressor().compress(data + b"more")
    assert decoder("zstd")(longer, UNIT) == data
    two = [zstandard.ZstdCompressor().compress(half) for half in (data[:1000], data[1000:])]
    assert decoder("zstd")(b"".join(two), UNIT) == data
    assert zstandard.ZstdDecompressor().decompress(encoder("zstd")(data)) == data


@pytest.mark.usefixtures("_deflate_library")
@pytest.mark.parametrize("codec", CODECS)
def test_truncated_streams_are_corrupt(codec: str) -> None:
    encoded = encoder(codec)(mixed(8))
    for length in (0, 1, 10, len(encoded) // 2, len(encoded) - 10):
        with pytest.raises(ImageCorrupt):
            decoder(codec)(encoded[:length], UNIT)
    short = encoder(codec)(mixed(8)[:-1])
    with pytest.raises(ImageCorrupt):
        decoder(codec)(short, UNIT)


def test_a_zstd_window_beyond_reason_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = writer.compress(mixed(9)) + writer.flush()
    with pytest.raises(ImageCorrupt):
        decoder("zstd")(frame, UNIT)


@given(garbage=st.binary(max_size=600), codec=st.sampled_from(CODECS))
@settings(max_examples=300, deadline=None)
def test_garbage_is_corrupt_or_decodes_to_a_unit(garbage: bytes, codec: str) -> None:
    with contextlib.suppress(ImageCorrupt):
        assert len(decoder(codec)(garbage, 4096)) == 4096


@given(position=st.integers(0, 2000), value=st.integers(0, 255), codec=st.sampled_from(CODECS))
@settings(max_examples=200, deadline=None)
def test_damaged_streams(position: int, value: int, codec: str) -> None:
    damaged = bytearray(encoder(codec)(mixed(10, 4096)))
    damaged[position % len(damaged)] = value
    with contextlib.suppress(ImageCorrupt):
        assert len(decoder(codec)(damaged, 4096)) == 4096


@pytest.mark.parametrize("codec", CODECS)
def test_threads_share_codecs(codec: str) -> None:
    failures: list[int] = []

    def work(seed: int) -> None:
        for number in range(20):
            data = mixed(seed * 100 + number, 8192)
            if decoder(codec)(encoder(codec)(data), 8192) != data:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_unknown_codecs_are_named() -> None:
    name: Callable[[str], object]
    for name in (decoder, encoder):
        with pytest.raises(ImageUnsupported, match="'lz77'"):
            name("lz77")
