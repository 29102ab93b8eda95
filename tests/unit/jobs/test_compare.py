from __future__ import annotations

import random
import threading

import pytest

from lamina.block.backend import Backend
from lamina.jobs.compare import (
    Difference,
    ReadFailed,
    Result,
    Settings,
    compare,
)

from .memory import MemoryDisk

K = 1024


def backend(disk: MemoryDisk) -> Backend:
    return Backend(disk)


def filled(size: int, *parts: tuple[int, bytes]) -> MemoryDisk:
    disk = MemoryDisk(size)
    for offset, data in parts:
        disk.fill(offset, data)
    return disk


def test_allocation_does_not_matter() -> None:
    one = filled(4096 * K, (0, b"x" * 700 * K), (2048 * K, bytes(64 * K)))
    other = filled(4096 * K, (0, b"x" * 700 * K), (3072 * K, bytes(4 * K)))
    other.zero(2100 * K, 8 * K)
    assert compare(backend(one), backend(other)) is None


@pytest.mark.parametrize("seed", range(30))
def test_the_first_sector_that_differs_is_named(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randint(1, 600) * 4 * K
    one = filled(size, (0, bytes(size))) if chance.random() < 0.5 else MemoryDisk(size)
    other = filled(size, (0, bytes(size)))
    places = sorted(chance.randrange(size) for _ in range(chance.randint(1, 3)))
    for place in places:
        other.data[place] = 1
    threads = threading.active_count()
    result = compare(backend(one), backend(other))
    assert result == Result(Difference.CONTENT, places[0] // 512 * 512)
    assert threading.active_count() == threads


@pytest.mark.parametrize("swap", [False, True])
def test_the_rest_of_the_longer_disk_has_to_be_zero(swap: bool) -> None:
    short, long = filled(8 * K, (0, b"x" * 8 * K)), filled(64 * K, (0, b"x" * 8 * K))
    told: list[bool] = []
    settings = Settings(sizes_differ=lambda: told.append(True))

    def run() -> Result | None:
        pair = (long, short) if swap else (short, long)
        return compare(backend(pair[0]), backend(pair[1]), settings)

    assert run() is None
    assert told == [True]
    long.fill(32 * K, bytes(1000) + b"x" * 3096)
    assert run() == Result(Difference.CONTENT, 32 * K + 512)
    assert told == [True, True]


def test_strict_means_sizes_and_status_too() -> None:
    strict = Settings(strict=True)
    one = filled(64 * K, (0, b"x" * 8 * K))
    assert compare(backend(one), backend(filled(32 * K)), strict) == Result(
        Difference.SIZE, 32 * K
    )
    other = filled(64 * K, (0, b"x" * 8 * K), (16 * K, bytes(4 * K)))
    assert compare(backend(one), backend(other)) is None
    # The status of a run that reaches the end differs from that of one that does not.
    assert compare(backend(one), backend(other), strict) == Result(Difference.STATUS, 8 * K)
    assert compare(backend(one), backend(one), strict) is None


def test_content_is_looked_at_before_the_status_of_what_follows() -> None:
    one = filled(64 * K, (0, b"x" * 8 * K))
    other = filled(64 * K, (0, b"x" * 4 * K + b"y" * 4 * K))
    other.zero(32 * K, 4 * K)
    result = compare(backend(one), backend(other), Settings(strict=True))
    assert result == Result(Difference.CONTENT, 4 * K)


def test_a_read_error_names_disk_and_place() -> None:
    one = filled(4096 * K, (0, b"x" * 4096 * K))
    other = filled(4096 * K, (0, b"x" * 4096 * K))
    other.fail_read_at = 2600 * K
    with pytest.raises(ReadFailed) as caught:
        compare(backend(one), backend(other))
    assert (caught.value.number, caught.value.offset) == (1, 2048 * K)
    assert str(caught.value) == "Input/output error"
