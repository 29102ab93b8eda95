"""What a check of QED finds, and what it makes good."""

from __future__ import annotations

import struct

import pytest

from lamina.formats.qed.layout import FEATURES_OFFSET, NEED_CHECK
from lamina.testing.memory import MemoryFile
from tests.unit.qed.images import ALL, LEAKS, UNIT, check, make, open_image

SIZE = 4 << 20


@pytest.fixture
def image() -> bytearray:
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    disk.write(0, b"1" * UNIT + b"2" * UNIT + b"3" * UNIT)
    disk.write(3 << 20, b"4" * UNIT)
    disk.close()
    return bytearray(file.content)


def table(image: bytearray, index: int = 0) -> int:
    l1 = struct.unpack_from("<Q", image, 40)[0]
    return struct.unpack_from("<Q", image, l1 + 8 * index)[0]


def test_sound(image: bytearray) -> None:
    result, _ = check(image)
    assert (result.corruptions, result.leaks) == (0, 0)
    assert (result.total_clusters, result.allocated_clusters) == (SIZE // UNIT, 4)
    assert result.fragmented_clusters == 1


@pytest.mark.parametrize("value", [0x5001, 0x500000, 8])
def test_entries_that_point_nowhere(image: bytearray, value: int) -> None:
    struct.pack_into("<Q", image, table(image) + 8, value)
    result, same = check(image)
    assert (result.corruptions, result.leaks, same) == (1, 1, image)
    result, fixed = check(image, LEAKS)
    assert (result.corruptions, result.corruptions_fixed, result.leaks) == (0, 1, 1)
    result, _ = check(fixed)
    assert (result.corruptions, result.leaks) == (0, 1)
    assert open_image(MemoryFile(fixed)).read(UNIT, UNIT) == bytes(UNIT)


def test_a_table_that_is_nowhere(image: bytearray) -> None:
    l1 = struct.unpack_from("<Q", image, 40)[0]
    struct.pack_into("<Q", image, l1, 1 << 40)
    result, _ = check(image)
    assert (result.corruptions, result.leaks) == (1, 4)
    result, fixed = check(image, ALL)
    assert result.corruptions_fixed == 1
    assert check(fixed)[0].corruptions == 0


def test_a_cluster_used_twice_is_shared_out(image: bytearray) -> None:
    place = struct.unpack_from("<Q", image, table(image))[0]
    struct.pack_into("<Q", image, table(image, 1) + 8 * 256, place)
    assert check(image)[0].corruptions == 1
    # It would be no repair to drop what may be the real owner.
    result, _ = check(image, LEAKS)
    assert (result.corruptions, result.corruptions_fixed) == (1, 0)
    result, fixed = check(image, ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert check(fixed)[0].corruptions == 0
    disk = open_image(MemoryFile(fixed))
    assert disk.read(0, UNIT) == disk.read(3 << 20, UNIT) == b"1" * UNIT


def test_a_table_used_twice(image: bytearray) -> None:
    l1 = struct.unpack_from("<Q", image, 40)[0]
    struct.pack_into("<Q", image, l1 + 16, table(image))
    assert check(image)[0].corruptions == 1
    result, fixed = check(image, ALL)
    assert result.corruptions_fixed == 1
    assert fixed[l1 + 16 : l1 + 24] == bytes(8)


def test_leaks_at_the_end_are_cut_off(image: bytearray) -> None:
    longer = image + b"\1" * 3 * UNIT
    assert check(longer)[0].leaks == 3
    result, fixed = check(longer, LEAKS)
    assert (result.leaks, result.leaks_fixed, fixed) == (0, 3, image)


def test_leaks_elsewhere_stay(image: bytearray) -> None:
    struct.pack_into("<Q", image, table(image), 0)
    result, _ = check(image, ALL)
    assert (result.leaks, result.leaks_fixed) == (1, 0)


def test_repairing_clears_the_mark(image: bytearray) -> None:
    image[FEATURES_OFFSET] = NEED_CHECK
    assert check(image)[1][FEATURES_OFFSET] == NEED_CHECK
    assert check(image, LEAKS)[1][FEATURES_OFFSET] == 0
