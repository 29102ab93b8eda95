"""The header: written and read again, and what is refused of it; so are hostile images."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.parallels.layout import MAX_CLUSTER_SECTORS, MAX_ENTRIES, Header, parse
from lamina.testing.memory import MemoryFile
from tests.unit.parallels.images import (
    ALL,
    bitmap_feature,
    empty_image,
    open_image,
    verify,
    with_extension,
)

SIZE = 64 << 10


@given(
    cluster=st.integers(1, MAX_CLUSTER_SECTORS),
    entries=st.integers(0, MAX_ENTRIES),
    data_start=st.integers(0, (1 << 32) - 1),
    in_use=st.integers(0, (1 << 32) - 1),
    extension=st.integers(0, 1 << 54),
    by_cluster=st.booleans(),
    share=st.floats(0, 1),
)
def test_round_trip(cluster, entries, data_start, in_use, extension, by_cluster, share):
    most = min(cluster * entries, 1 << 54 if by_cluster else 0xFFFFFFFF)
    header = Header(
        cluster, entries, int(most * share), data_start, by_cluster, in_use, extension, 1
    )
    packed = header.pack()
    assert len(packed) == 64
    assert parse(packed) == header
    assert parse(packed).pack() == packed


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "Image not in Parallels format"),
        (16, struct.pack("<I", 3), "Image not in Parallels format"),
        (28, struct.pack("<I", 0), "Invalid image: Zero sectors per track"),
        (28, struct.pack("<I", 0x7FFFFFFF), "Invalid image: Too big cluster"),
        (32, struct.pack("<I", 0x7FFFFFFF), "Catalog too large"),
        (32, struct.pack("<I", 0x1FFFFFFF), "The BAT lies behind the end of the image"),
        (32, struct.pack("<I", 0), "The BAT has no entries for all of the disk"),
        (36, struct.pack("<Q", 1 << 62), "File too large"),
        (36, struct.pack("<Q", 4096), "The BAT has no entries for all of the disk"),
        (56, struct.pack("<Q", 1 << 62), "Invalid image: Too big offset"),
    ],
)
def test_header_fields(offset, data, message):
    image = bytearray(empty_image(SIZE))
    image[offset : offset + len(data)] = data
    with pytest.raises(LaminaError) as caught:
        open_image(MemoryFile(image))
    assert str(caught.value) == message
    assert caught.value.format == "parallels"
    assert caught.value.offset is not None


def test_old_sizes_are_of_32_bits():
    image = bytearray(empty_image(SIZE, by_cluster=False))
    image[40:44] = b"\xff" * 4
    assert open_image(MemoryFile(image)).size == SIZE


def test_short_files():
    image = empty_image(SIZE)
    for length in (0, 10, 63, 64, 100):
        with pytest.raises(ImageCorrupt):
            open_image(MemoryFile(image[:length]))


def test_fuzz():
    """Read, written, checked and repaired: our errors only, and what was repaired is sound."""
    rng = random.Random(1)
    seeds = []
    for by_cluster in (True, False):
        file = MemoryFile(empty_image(SIZE, by_cluster=by_cluster))
        disk = open_image(file)
        for offset in range(0, SIZE - 3000, 5000):
            disk.write(offset, b"data" * 700)
        disk.discard(10_000, 20_000)
        disk.close()
        seeds.append(bytes(file.content))
    seeds.append(with_extension(seeds[0], bitmap_feature(SIZE // 512, [1], granularity=1)))
    opened = repaired = 0
    for number in range(700):
        image = bytearray(seeds[number % 3])
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(64), rng.randrange(64, 400), rng.randrange(len(image))))
            junk = rng.choice((b"\xff" * 4, bytes(4), b"\1", rng.randbytes(1), rng.randbytes(4)))
            image[at : at + len(junk)] = junk
        if rng.random() < 0.1:
            del image[rng.randrange(len(image)) :]
        with contextlib.suppress(LaminaError):
            disk = open_image(MemoryFile(image), check=True)
            size = min(disk.size, SIZE)
            disk.extents(0, size)
            list(disk.columns(0, size))
            disk.info()
            disk.read(0, size)
            opened += 1
        with contextlib.suppress(LaminaError):
            disk = open_image(MemoryFile(image))
            disk.write(min(5000, disk.size - 9), b"x" * 9)
            disk.close()
        with contextlib.suppress(LaminaError):
            _, _, content = verify(bytes(image), ALL)
            assert len(content) < 1 << 24
            _, lines, _ = verify(content)
            assert lines == []
            repaired += 1
    assert opened > 200
    assert repaired > 350
