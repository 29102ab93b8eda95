"""Dirty bitmaps in the format extension, and images that have been changed by others since."""

from __future__ import annotations

import contextlib
import random
import struct
import uuid

import pytest

from lamina.block.driver import Fix
from lamina.block.node import NodeOptions
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError
from lamina.testing.memory import MemoryFile
from tests.unit.parallels.images import (
    ALL,
    UNIT,
    bitmap_feature,
    empty_image,
    open_image,
    verify,
    with_extension,
)

SIZE = 64 << 10
SECTORS = SIZE // 512
NAME = str(uuid.UUID(bytes=bytes(range(16))))
READ_ONLY = NodeOptions(read_only=True, filename="memory")


def opened(content: bytes):
    return open_image(MemoryFile(content, READ_ONLY))


def with_bits(bits: bytes, granularity: int = 1) -> bytes:
    content = empty_image(SIZE)
    place = len(content) // 512
    feature = bitmap_feature(SECTORS, [place], granularity=granularity)
    return with_extension(content + bits.ljust(UNIT, b"\0"), feature)


def test_bits():
    disk = opened(with_bits(bytes([0b01100000, 0b00011100, 0, 0x40])))
    (bitmap,) = disk.dirty_bitmaps
    assert (bitmap.name, bitmap.granularity, bitmap.enabled) == (NAME, 512, False)
    assert list(bitmap.ranges()) == [(5 * 512, 1024), (10 * 512, 1536), (30 * 512, 512)]
    assert disk.info().specific == {"bitmaps": [{"name": NAME, "granularity": 512}]}


@pytest.mark.parametrize(("place", "dirty"), [(0, []), (1, [(0, SIZE)])])
def test_all_alike(place, dirty):
    content = with_extension(empty_image(SIZE), bitmap_feature(SECTORS, [place], granularity=1))
    (bitmap,) = opened(content).dirty_bitmaps
    assert list(bitmap.ranges()) == dirty


def test_its_clusters_are_in_use():
    content = with_bits(b"\xff")
    assert verify(content)[1] == []
    result, _, after = verify(content + bytes(UNIT), ALL)
    assert result.leaks_fixed == 1
    assert after == content


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (bitmap_feature(5, [0]), "Bitmap size (in sectors) 5 differs from disk size in sectors"),
        (bitmap_feature(SECTORS, [0], granularity=3), "Bitmap granularity 3 is not a power of two"),
        (bitmap_feature(SECTORS, [0], granularity=0), "Bitmap granularity 0 is not a power of two"),
        (bitmap_feature(SECTORS, [0, 0]), "Bitmap has 2 entries, and needs 1"),
        (struct.pack("<QQII", 0x20385FAE252CB34A, 0, 5, 0) + bytes(8), "Dirty bitmap is too short"),
        (struct.pack("<QQII", 7, 0, 1 << 31, 0), "Feature of Format Extension ends behind its end"),
    ],
)
def test_damaged_features(feature, message):
    content = with_extension(empty_image(SIZE), feature)
    with pytest.raises(ImageCorrupt) as caught:
        opened(content)
    assert str(caught.value).startswith(message)
    assert caught.value.structure == "format extension"
    # A check goes on, and gets rid of it.
    result, lines, after = verify(content, ALL)
    assert lines[0] == f"Repairing {caught.value}"
    assert result.corruptions_fixed == 1
    assert opened(after).dirty_bitmaps == []


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "Wrong parallels Format Extension magic: 0x"),
        (8, "Wrong checksum in Format Extension header. Format extension is corrupted."),
        (200, "Wrong checksum in Format Extension header. Format extension is corrupted."),
    ],
)
def test_damaged_clusters(at, message):
    content = bytearray(with_bits(b""))
    content[len(content) - UNIT + at] ^= 1
    with pytest.raises(ImageCorrupt) as caught:
        opened(bytes(content))
    assert str(caught.value).startswith(message)


def test_behind_the_end():
    content = bytearray(with_bits(b""))
    struct.pack_into("<Q", content, 56, 1 << 40)
    with pytest.raises(ImageCorrupt, match="Format Extension lies behind the end of the image"):
        opened(bytes(content))
    far = with_extension(empty_image(SIZE), bitmap_feature(SECTORS, [1 << 40], granularity=1))
    (bitmap,) = opened(far).dirty_bitmaps
    with pytest.raises(ImageCorrupt, match="Bits of a bitmap lie behind the end of the image"):
        list(bitmap.ranges())


@pytest.mark.parametrize("in_use", [0, 0x746F6E59, 5])
def test_whoever_did_not_know_of_it(in_use):
    content = bytearray(with_bits(b"\xff"))
    struct.pack_into("<I", content, 44, in_use)
    disk = opened(bytes(content))
    assert disk.dirty_bitmaps == []
    assert disk.context.warnings == ["warning: Format Extension is out of date and is ignored"]


@pytest.mark.parametrize("in_use", [0, 0x746F6E59])
@pytest.mark.parametrize("fix", [Fix(leaks=True), ALL])
def test_repairs_leave_no_pointer_to_what_is_cut_off(in_use, fix):
    content = bytearray(with_bits(b"\xff"))
    struct.pack_into("<I", content, 44, in_use)
    result, _, after = verify(bytes(content), fix)
    assert result.leaks_fixed == 2
    assert len(after) == len(content) - 2 * UNIT
    assert struct.unpack_from("<Q", after, 56) == (0,)


def test_writing_drops_it():
    file = MemoryFile(with_bits(b"\xff"))
    disk = open_image(file)
    assert disk.context.warnings == ["warning: Format Extension ignored in RW mode"]
    assert disk.dirty_bitmaps == []
    disk.read(0, SIZE)
    disk.close()
    assert file.content == with_bits(b"\xff")
    disk = open_image(file)
    disk.write(0, b"x")
    disk.close()
    assert struct.unpack_from("<Q", file.content, 56) == (0,)
    assert opened(bytes(file.content)).dirty_bitmaps == []
    assert verify(bytes(file.content))[1] == []


def test_unknown_features():
    for flags in (0, 2):
        content = with_extension(
            empty_image(SIZE), bitmap_feature(1, [0], magic=0x1234, flags=flags)
        )
        assert opened(content).dirty_bitmaps == []
        open_image(MemoryFile(content)).close()
    necessary = with_extension(empty_image(SIZE), bitmap_feature(1, [0], magic=0x1234, flags=1))
    disk = opened(necessary)
    assert disk.read(0, 512) == bytes(512)
    with pytest.raises(ImageUnsupported, match="must know to change it"):
        open_image(MemoryFile(necessary))
    with pytest.raises(ImageUnsupported, match="must know to change it"):
        disk.reopen(read_only=False)


def test_fuzz():
    """With the checksum put right, so that what is behind it is looked at."""
    rng = random.Random(1)
    seed = bitmap_feature(SECTORS, [1], granularity=1) + bitmap_feature(1, [0], magic=99)
    accepted = 0
    for _ in range(800):
        feature = bytearray(seed)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(feature))
            junk = rng.choice((b"\xff" * 8, bytes(4), b"\1", rng.randbytes(1), rng.randbytes(8)))
            feature[at : at + len(junk)] = junk
        content = with_extension(empty_image(SIZE), bytes(feature[:200]))
        with contextlib.suppress(LaminaError):
            disk = opened(content)
            for bitmap in disk.dirty_bitmaps:
                list(bitmap.ranges())
            accepted += 1
        with contextlib.suppress(LaminaError):
            verify(content, ALL)
    assert accepted > 50


def test_features_that_are_to_stay() -> None:
    """Those that nobody here knows, with what may belong to them; bitmaps go all the same."""
    content = bytearray(empty_image(SIZE))
    theirs = len(content)
    content += b"theirs!!" * (UNIT // 8)
    stays = struct.pack("<QQII", 99, 2, 5, 0) + b"hello\0\0\0"
    goes = struct.pack("<QQII", 98, 0, 3, 0) + b"bye\0\0\0\0\0"
    bitmap = bitmap_feature(SECTORS, [1], granularity=1)
    content = with_extension(bytes(content), goes + stays + bitmap)
    place = struct.unpack_from("<Q", content, 56)[0] * 512
    assert verify(content)[1] == []
    file = MemoryFile(content)
    for number in range(2):
        disk = open_image(file)
        disk.write(number * 2 * UNIT, b"x" * 2 * UNIT)
        disk.discard(0, UNIT)
        with pytest.raises(ImageUnsupported, match="to resize it"):
            disk.truncate(2 * SIZE)
        disk.close()
        assert struct.unpack_from("<Q", file.content, 56)[0] * 512 == place
        assert file.content[place + 24 : place + 24 + len(stays) + 24] == stays + bytes(24)
        assert file.content[theirs : theirs + UNIT] == b"theirs!!" * (UNIT // 8)
        assert verify(bytes(file.content))[1] == []
        assert not opened(bytes(file.content)).dirty_bitmaps
