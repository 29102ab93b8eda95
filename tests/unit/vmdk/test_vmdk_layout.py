"""Headers, markers and compressed grains: written and read again."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import decoder, encoder
from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.vmdk import cowd, sesparse
from lamina.formats.vmdk.layout import (
    AT_END,
    MARKER_DIRECTORY,
    SparseHeader,
    pack_grain,
    pack_marker,
    parse_footer,
    parse_header,
    parse_marker,
)
from lamina.formats.vmdk.stream import trailer

SECTORS = st.integers(0, (1 << 50) - 1).map(lambda n: n * 512)


@settings(deadline=None)
@given(
    st.builds(
        SparseHeader,
        capacity=st.integers(0, 1 << 40).map(lambda n: n * 512),
        directory_offset=SECTORS | st.just(-1),
        overhead=SECTORS,
        version=st.integers(1, 3),
        flags=st.integers(0, (1 << 32) - 1).map(lambda n: n & ~(1 << 16)),
        grain=st.integers(7, 17).map(lambda n: 512 << n),
        descriptor_offset=SECTORS,
        descriptor_size=SECTORS,
        table_entries=st.integers(256, 512),
        redundant_offset=SECTORS,
        unclean=st.booleans(),
        compression=st.integers(0, 65535),
    )
)
def test_headers_round_trip(header: SparseHeader) -> None:
    assert len(header.pack()) == 512
    assert parse_header(header.pack()) == header


def test_a_header_byte_by_byte() -> None:
    """As QEMU writes one for 1 MiB, but for what is all the same."""
    packed = SparseHeader(1 << 20, 26 * 512, 65536, redundant_offset=21 * 512).pack()
    assert packed[:79].hex() == (
        "4b444d56" "01000000" "03000000" "0008000000000000" "8000000000000000"
        "0100000000000000" "1400000000000000" "00020000" "1500000000000000"
        "1a00000000000000" "8000000000000000" "00" "0a200d0a" "0000"
    )
    assert SparseHeader(512, -1, 65536).pack()[56:64] == AT_END.to_bytes(8, "little")


def test_the_end_of_a_stream() -> None:
    header = SparseHeader(1 << 20, 70000 * 512, 65536, version=3, flags=0x30001, compression=1)
    end = trailer(header, bytes(512))
    assert parse_marker(end) == (1, 0, MARKER_DIRECTORY)
    assert len(end) == 5 * 512
    assert parse_footer(end[-1536:]) == header
    for damaged in (end[-1535:], bytes(1536), end[-1536:-512] + b"\1" * 512, end[:1536]):
        with pytest.raises(ImageCorrupt, match="Invalid footer"):
            parse_footer(damaged)
    with pytest.raises(ImageCorrupt, match="Invalid footer"):
        parse_footer(trailer(SparseHeader(512, -1, 65536), b"")[-1536:])


@pytest.mark.parametrize("length", [512, 65536])
@pytest.mark.parametrize("kind", ["random", "zeroes", "text"])
def test_grains_round_trip(length: int, kind: str) -> None:
    data = {
        "random": os.urandom(length),
        "zeroes": bytes(length),
        "text": (b"hello world\n" * length)[:length],
    }[kind]
    encoded = encoder("grain")(data)
    assert zlib.decompress(encoded) == data
    stored = pack_grain(123 * 512, encoded)
    assert len(stored) % 512 == 0
    assert parse_marker(stored)[:2] == (123, len(encoded))
    assert decoder("grain")(stored + b"more", length) == data


def test_grains_may_be_short_and_must_not_be_long() -> None:
    decode = decoder("grain")
    assert decode(pack_grain(0, zlib.compress(b"x" * 100)), 512) == b"x" * 100 + bytes(412)
    for damaged in (
        b"",
        b"\0" * 11,
        pack_grain(0, zlib.compress(b"x" * 513)),
        pack_grain(0, zlib.compress(os.urandom(512))[:-100]),
        pack_grain(0, zlib.compress(os.urandom(512)))[:400],
        pack_grain(0, b"no zlib stream at all"),
        pack_grain(0, b""),
    ):
        with pytest.raises(ImageCorrupt):
            decode(damaged, 512)


def test_markers_fill_a_sector() -> None:
    assert len(pack_marker(MARKER_DIRECTORY, 1024)) == 512
    assert parse_marker(pack_marker(MARKER_DIRECTORY, 1024)) == (2, 0, MARKER_DIRECTORY)


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_no_bytes_are_a_problem(data: bytes) -> None:
    for parse in (parse_header, parse_footer, cowd.parse_header, sesparse.parse_header):
        for head in (data, b"KDMV" + data, b"COWD" + data, sesparse.MAGIC.to_bytes(8, "little")):
            with suppress(LaminaError):
                parse(head)


def test_headers_of_esx_round_trip() -> None:
    header = cowd.CowdHeader(5000 * 512, 512, 4 * 512, 2)
    assert cowd.parse_header(header.pack()) == header
    area = sesparse.Area
    other = sesparse.SeSparseHeader(
        1 << 30, area(512, 512), area(4096, 4096), area(8192, 1 << 20), area(1 << 21, 1 << 30)
    )
    assert sesparse.parse_header(other.pack()) == other
    assert sesparse.grain_entry(0x12345) == 0x3345_0000_0000_0012
