"""The checksums of DMGs, and what is said of those that are wrong."""

from __future__ import annotations

import struct
import zlib

import pytest

from lamina.block.driver import Fix
from lamina.formats.dmg import DRIVER
from lamina.formats.dmg.check import crc32_with_zeroes
from tests.unit.dmg.images import ENCODERS, IGNORE, RAW, ZERO, Row, image, open_image, pack, table

CONTENT = b"some text" * 3000 + bytes(20_000) + b"more of it" * 2000


def check(content: bytes) -> tuple[int, list[str]]:
    lines: list[str] = []
    result = DRIVER.check(open_image(content), Fix(), lines.append)
    assert result.leaks == result.check_errors == 0
    assert result.image_end_offset == len(content)
    return result.corruptions, lines


@pytest.mark.parametrize("binary", [False, True])
def test_sound_images(binary):
    content = CONTENT[: len(CONTENT) // 512 * 512]
    assert check(pack(content, (RAW, *ENCODERS), chunk=7, binary=binary)) == (0, [])


def test_changed_data():
    content = bytearray(pack(CONTENT[:40_960], (RAW,), chunk=7))
    content[100] ^= 1
    corruptions, lines = check(bytes(content))
    assert corruptions == 2
    assert lines[0].startswith("ERROR the data fork: checksum is 0x")
    assert lines[1].startswith("ERROR block table 0: checksum is 0x")


def test_data_that_cannot_be_decoded():
    content = bytearray(pack(CONTENT[:10_240], (0x80000005,), partitions=1))
    content[20] ^= 0xFF
    corruptions, lines = check(bytes(content))
    assert corruptions == 2
    assert lines[1] == "ERROR block table 0: cannot be read: Input/output error"


def test_wrong_sum_of_sums():
    rows = [Row(RAW, 0, 1, 0, 512)]
    sum = zlib.crc32(b"x" * 512)
    one = table(0, rows, sum)
    assert check(image(b"x" * 512, [one], 1, master_crc=5)) == (
        1,
        [f"ERROR the image: checksum is {zlib.crc32(struct.pack('>I', sum)):#010x}, "
         "expected 0x00000005"],
    )


def test_chunks_that_lie_nowhere():
    rows = [Row(RAW, 0, 1, 1 << 30, 512), Row(0x80000010, 1, 1, 0, 1)]
    assert check(image(b"", [table(0, rows)], 2)) == (
        1,
        ["ERROR 2 chunks lie outside of the image or are of unknown types"],
    )


def test_other_kinds_of_checksums():
    one = bytearray(table(0, [Row(ZERO, 0, 1, 0, 0)]))
    struct.pack_into(">II", one, 64, 4, 128)
    assert check(image(b"", [bytes(one)], 1)) == (
        0,
        ["The checksum of block table 0 is of type 4: not checked"],
    )


@pytest.mark.parametrize("summed", [True, False])
def test_ignored_sectors_are_summed_by_some(summed):
    rows = [Row(RAW, 0, 1, 0, 512), Row(IGNORE, 1, 3, 0, 0), Row(ZERO, 4, 2, 0, 0)]
    rows.append(Row(RAW, 6, 1, 0, 512))
    data = b"x" * 512
    sum = zlib.crc32(data + bytes(1536 if summed else 0) + bytes(1024) + data)
    assert check(image(data, [table(0, rows, sum)], 7)) == (0, [])


@pytest.mark.parametrize("count", [0, 1, 511, 512, 100_000])
def test_sums_of_zeroes(count):
    for data in (b"", b"abc"):
        assert crc32_with_zeroes(zlib.crc32(data), count) == zlib.crc32(data + bytes(count))
    # In no time, however many there are.
    half = crc32_with_zeroes(0, 1 << 61)
    assert crc32_with_zeroes(0, 1 << 62) == crc32_with_zeroes(half, 1 << 61)
