"""Parallels disks of other sizes: what is kept, what goes, and where the BAT finds room."""

from __future__ import annotations

import random
import struct
import threading

import pytest

from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import NodeOptions
from lamina.errors import ImageUnsupported, StorageError, UsageError
from lamina.testing.memory import MemoryFile
from tests.unit.parallels.images import (
    UNIT,
    bitmap_feature,
    empty_image,
    open_image,
    table,
    verify,
    with_extension,
)

SIZE = 64 << 10
WAYS = {
    "clusters": {"by_cluster": True},
    "sectors": {"by_cluster": False},
    "sectors, old": {"by_cluster": False, "data_start": 0},
}


def sound(file: MemoryFile) -> None:
    result, lines, _ = verify(bytes(file.content))
    assert (result.corruptions, result.leaks, lines) == (0, 0, [])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
def test_again_and_again(way, backed):
    rng = random.Random(way)
    below = rng.randbytes(SIZE) if backed else None
    content = bytearray(below or bytes(SIZE))
    file = MemoryFile(empty_image(SIZE, **WAYS[way]))
    disk = open_image(file, below, prealloc=5000)
    for number in range(60):
        offset = rng.randrange(len(content))
        data = rng.randbytes(min(rng.randrange(1, 9000), len(content) - offset))
        disk.write(offset, data)
        content[offset : offset + len(data)] = data
        if number % 3 == 0 and not backed:
            length = min(3 * UNIT, len(content))
            disk.write_zeroes(0, length, WriteFlags.MAY_UNMAP)
            content[:length] = bytes(length)
        if number % 2:
            size = rng.choice([rng.randrange(1, 40), rng.randrange(1, 2000)]) * 512
            disk.truncate(size, zeroed=True)
            content = content[:size].ljust(size, b"\0")
        assert disk.size == len(content)
        assert disk.read(0, len(content)) == content
        if number % 10 == 9:
            disk.close()
            sound(file)
            file = MemoryFile(file.content)
            disk = open_image(file, below, prealloc=5000)
    disk.close()
    sound(file)


@pytest.mark.parametrize("way", WAYS)
def test_clusters_make_room(way):
    file = MemoryFile(empty_image(SIZE, **WAYS[way]))
    disk = open_image(file)
    disk.write(0, b"a" * UNIT + b"b" * UNIT + b"c" * UNIT)
    disk.flush()
    before = table(bytes(file.content))
    disk.truncate(64 * SIZE)
    disk.close()
    sound(file)
    after = table(bytes(file.content))
    entries, sectors, _, data_start = struct.unpack_from("<IQII", file.content, 32)
    assert (entries, sectors) == (64 * SIZE // UNIT, 64 * SIZE // 512)
    assert struct.unpack_from("<II", file.content, 20) == (16, 64 * SIZE // 512 // 512)
    scale = UNIT if WAYS[way]["by_cluster"] else 512
    assert min(before[:3]) * scale < 64 + 4 * entries <= data_start * 512
    assert min(after[:3]) * scale >= data_start * 512
    assert not any(after[3:])


def test_shrinking_frees_what_is_behind():
    options = NodeOptions(read_only=False, unmap=True, filename="memory")
    file = MemoryFile(empty_image(SIZE), options)
    disk = open_image(file)
    for block in (60, 1, 50, 2):
        disk.write(block * UNIT, bytes([block]) * UNIT)
    disk.flush()
    full = len(file.content)
    disk.truncate(10 * UNIT)
    # A gap before block 1, which new data fills, and one before block 2; nothing behind that.
    assert len(file.content) == full
    assert "discard" in file.calls
    disk.write(5 * UNIT, b"x" * UNIT)
    disk.write(6 * UNIT, b"y" * UNIT)
    disk.close()
    assert len(file.content) == full
    sound(file)
    disk = open_image(file)
    disk.truncate(UNIT)
    assert len(file.content) == UNIT
    disk.truncate(SIZE)
    assert disk.read(0, SIZE) == bytes(SIZE)


def test_what_lay_behind_the_end_does_not_come_to_light():
    """Of an image whose BAT and last cluster hold more than the disk."""
    image = bytearray(empty_image(SIZE))
    file = MemoryFile(image)
    disk = open_image(file)
    disk.write(0, b"x" * 4 * UNIT)
    disk.close()
    struct.pack_into("<Q", file.content, 36, 3)
    disk = open_image(MemoryFile(file.content))
    assert disk.size == 3 * 512
    disk.truncate(SIZE)
    assert disk.read(0, SIZE) == (b"x" * 3 * 512).ljust(SIZE, b"\0")
    disk.close()
    sound(disk.file)


def test_the_extension_goes_first():
    image = with_extension(empty_image(SIZE), bitmap_feature(SIZE // 512, [1], granularity=1))
    file = MemoryFile(image)
    disk = open_image(file)
    disk.truncate(2 * SIZE)
    disk.close()
    assert struct.unpack_from("<Q", file.content, 56) == (0,)
    sound(file)


@pytest.mark.parametrize(
    ("size", "by_cluster"), [(1000, True), (1 << 62, True), (4 << 40, True), (2 << 40, False)]
)
def test_sizes_that_no_image_has(size, by_cluster):
    file = MemoryFile(empty_image(SIZE, by_cluster=by_cluster))
    disk = open_image(file)
    with pytest.raises(UsageError):
        disk.truncate(size)
    with pytest.raises(ImageUnsupported, match="Unsupported preallocation mode 'full'"):
        disk.truncate(2 * SIZE, Preallocation.FULL)
    assert disk.size == SIZE
    disk.close()
    sound(file)


@pytest.mark.parametrize("kind", ["write", "truncate", "flush", "zero"])
def test_storage_that_fails(kind):
    """At any moment: the disk stays as it was, and goes on."""
    for moment in range(12):
        file = MemoryFile(empty_image(SIZE))
        disk = open_image(file)
        content = random.Random(moment).randbytes(5 * UNIT).ljust(SIZE, b"\0")
        disk.write(0, content[: 5 * UNIT])
        disk.flush()
        left = moment

        def fail(what, offset, length):
            nonlocal left
            if what == kind:
                left -= 1
                if left < 0:
                    raise StorageError("full")

        file.hook = fail
        try:
            disk.truncate(64 * SIZE)
        except StorageError:
            failed = True
        else:
            failed = False
        file.hook = None
        assert disk.size == (SIZE if failed else 64 * SIZE)
        disk.write(6 * UNIT, b"!" * UNIT)
        content = content[: 6 * UNIT] + b"!" * UNIT + content[7 * UNIT :]
        assert disk.read(0, SIZE) == content
        disk.truncate(64 * SIZE)
        disk.close()
        sound(file)
        assert open_image(file).read(0, SIZE) == content
        if not failed:
            break
    assert moment > 0


def test_readers_meanwhile():
    """Clusters that move are read while they do."""
    file = MemoryFile(empty_image(SIZE))
    disk = open_image(file)
    content = random.Random(5).randbytes(SIZE)
    disk.write(0, content)
    stop = threading.Event()
    wrong: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            found = disk.read(0, 8 * UNIT)
            if found != content[: 8 * UNIT]:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for factor in (10, 1, 40, 1, 100, 1, 400, 1):
        disk.truncate(factor * SIZE)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert disk.read(0, SIZE) == content
    disk.close()
    sound(file)
