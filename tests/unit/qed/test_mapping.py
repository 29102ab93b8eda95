"""QED images seen through their file: marks, zero clusters, growing, other backing files."""

from __future__ import annotations

import random
import struct

import pytest

from lamina.block.extents import Kind
from lamina.block.limits import Preallocation
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, UsageError
from lamina.formats.qed import DRIVER
from lamina.formats.qed.layout import AUTOCLEAR_OFFSET, FEATURES_OFFSET, NEED_CHECK
from lamina.testing.memory import MemoryFile
from tests.unit.qed.images import UNIT, check, make, open_image

SIZE = 4 << 20


def storage(disk: Disk) -> MemoryFile:
    assert isinstance(disk.file, MemoryFile)
    return disk.file


def features(file: MemoryFile) -> int:
    return struct.unpack_from("<Q", file.content, FEATURES_OFFSET)[0]


def test_the_mark_is_there_while_clusters_are_allocated() -> None:
    disk = open_image(MemoryFile(make(SIZE)))
    file = storage(disk)
    disk.flush()
    assert features(file) == 0
    seen: list[int] = []
    # Whenever a table is written, the mark is durable.
    file.hook = lambda kind, offset, length: (
        seen.append(features(file)) if kind == "write" and offset >= UNIT and length < 600 else None
    )
    disk.write(5, b"data")
    disk.flush()
    assert features(file) == NEED_CHECK
    disk.write(7, b"in place")
    disk.close()
    assert features(file) == 0
    assert set(seen[1:]) == {NEED_CHECK}


def test_writing_in_place_needs_no_mark() -> None:
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * UNIT)
    disk.close()
    disk = open_image(file)
    disk.write(100, b"y")
    disk.flush()
    assert features(file) == 0


def test_a_marked_image_is_checked_when_it_is_opened_for_writing() -> None:
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * UNIT)
    disk.flush()
    crashed = bytes(file.content)
    assert features(MemoryFile(crashed)) == NEED_CHECK
    again = MemoryFile(crashed + bytes(2 * UNIT))
    disk = open_image(again)
    assert features(again) == 0
    assert again.size == len(crashed)
    assert disk.read(0, UNIT) == b"x" * UNIT


def test_reading_only_leaves_the_mark_until_it_is_written_to() -> None:
    image = bytearray(make(SIZE))
    image[FEATURES_OFFSET] = NEED_CHECK
    file = MemoryFile(image)
    file.read_only = True
    disk = open_image(file)
    disk.read(0, UNIT)
    assert features(file) == NEED_CHECK
    disk.reopen(read_only=False)
    assert features(file) == 0


def test_a_cluster_used_twice_is_shared_out_before_a_marked_image_is_written_to() -> None:
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * 2 * UNIT)
    disk.flush()
    image = bytearray(file.content)
    l1 = struct.unpack_from("<Q", image, 40)[0]
    table = struct.unpack_from("<Q", image, l1)[0]
    image[table + 8 : table + 16] = image[table : table + 8]
    again = MemoryFile(image)
    disk = open_image(again)
    disk.write(0, b"y" * UNIT)
    assert disk.read(UNIT, UNIT) == b"x" * UNIT
    disk.close()
    assert check(again.content)[0].corruptions == 0


def test_autoclear_features_are_cleared_before_the_first_write() -> None:
    image = bytearray(make(SIZE))
    image[AUTOCLEAR_OFFSET : AUTOCLEAR_OFFSET + 8] = b"\xff" * 8
    file = MemoryFile(image)
    disk = open_image(file)
    disk.close()
    assert file.content[AUTOCLEAR_OFFSET] == 0xFF
    disk = open_image(file)
    disk.write(0, b"x")
    disk.close()
    assert file.content[AUTOCLEAR_OFFSET : AUTOCLEAR_OFFSET + 8] == bytes(8)


def test_zero_clusters_take_no_space() -> None:
    file = MemoryFile(make(SIZE, backing_file="below"))
    disk = open_image(file, b"b" * SIZE)
    disk.write_zeroes(UNIT, 100 * UNIT)
    assert [extent.kind for extent in disk.extents(0, 102 * UNIT)] == [
        Kind.BELOW,
        Kind.ZERO,
        Kind.BELOW,
    ]
    assert disk.read(0, 3 * UNIT) == b"b" * UNIT + bytes(2 * UNIT)
    disk.write(2 * UNIT + 5, b"x")
    assert disk.read(2 * UNIT, UNIT) == bytes(5) + b"x" + bytes(UNIT - 6)
    disk.close()
    assert check(file.content)[0].allocated_clusters == 1


def test_discards_give_storage_back_and_leak_nothing() -> None:
    file = MemoryFile(
        make(SIZE, backing_file="below"), NodeOptions(read_only=False, unmap=True)
    )
    disk = open_image(file, b"b" * SIZE)
    disk.write(0, b"x" * 4 * UNIT)
    file.calls.clear()
    disk.discard(UNIT, 2 * UNIT)
    assert file.calls == ["discard"]
    assert disk.read(0, 4 * UNIT) == b"x" * UNIT + bytes(2 * UNIT) + b"x" * UNIT
    disk.close()
    assert check(file.content)[0].leaks == 0


def test_growing_covers_a_longer_backing_file() -> None:
    size = 10 * UNIT + 512
    file = MemoryFile(make(size, backing_file="below"))
    disk = open_image(file, b"b" * SIZE)
    disk.truncate(20 * UNIT, zeroed=True)
    assert disk.read(0, 20 * UNIT) == (b"b" * size).ljust(20 * UNIT, b"\0")
    disk.close()
    assert open_image(file, b"b" * SIZE).size == 20 * UNIT


def test_sizes_that_cannot_be() -> None:
    disk = open_image(MemoryFile(make(SIZE)))
    with pytest.raises(ImageUnsupported, match="Shrinking images is currently not supported"):
        disk.truncate(SIZE // 2)
    with pytest.raises(UsageError, match="Invalid image size specified"):
        disk.truncate((512 * 512 + 1) * UNIT)
    with pytest.raises(ImageUnsupported, match="Unsupported preallocation mode 'full'"):
        disk.truncate(2 * SIZE, Preallocation.FULL)
    assert disk.size == SIZE


def test_another_backing_file() -> None:
    file = MemoryFile(make(SIZE, backing_file="a long name", backing_fmt="raw"))
    disk = open_image(file, b"b" * SIZE)
    assert disk.info().backing_format == "raw"
    DRIVER.change_backing_file(disk, "short", "qcow2")
    about = open_image(MemoryFile(file.content)).info()
    assert (about.backing_filename, about.backing_format) == ("short", None)
    DRIVER.change_backing_file(disk, None, None)
    assert open_image(MemoryFile(file.content)).info().backing_filename is None
    assert not any(file.content[64:512])
    with pytest.raises(LaminaError):
        DRIVER.change_backing_file(disk, "x" * 1024, "raw")


def test_columns_of_a_damaged_table() -> None:
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * 3 * UNIT)
    disk.flush()
    l1 = struct.unpack_from("<Q", file.content, 40)[0]
    table = struct.unpack_from("<Q", file.content, l1)[0]
    struct.pack_into("<Q", file.content, table + 8, 7 << 50)
    disk = open_image(MemoryFile(file.content), check=True)
    with pytest.raises(ImageCorrupt) as caught:
        list(disk.columns(0, SIZE))
    assert caught.value.field == f"entry of guest offset {UNIT:#x}"


def test_wild_pointers() -> None:
    """Entries that point anywhere: an error of ours, no hang, no memory."""
    rng = random.Random(1)
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"data" * 5000)
    disk.write(3 << 20, b"data" * 5000)
    disk.close()
    tables = [struct.unpack_from("<Q", file.content, 40)[0]]
    tables += struct.unpack_from("<2Q", file.content, tables[0])
    for _ in range(80):
        image = bytearray(file.content)
        for _ in range(2):
            at = rng.choice(tables) + 8 * rng.randrange(6)
            value = rng.choice([rng.randrange(1 << 64), rng.randrange(len(image) // UNIT) * UNIT])
            struct.pack_into("<Q", image, at, value)
        try:
            disk = open_image(MemoryFile(image))
            disk.read(0, 10 * UNIT)
            disk.read(3 << 20, UNIT)
            list(disk.columns(0, SIZE))
            disk.write(100, b"x")
            disk.close()
        except LaminaError:
            pass
        result, repaired = check(bytes(image))
        assert result.check_errors == 0
        assert repaired == image
