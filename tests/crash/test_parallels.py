"""Power cuts while a Parallels image is written to and resized: nothing leaks into
another place, and opening it again puts right what is left to be put right."""

from __future__ import annotations

import random

import pytest

from lamina.testing.crash import CrashFile, GuestLog, power_cuts
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
UNIT = 1024


def random_work(seed: int, *, backing: bytes | None = None, prealloc: int = 0):
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file, backing, prealloc=prealloc)
        for _ in range(28):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, UNIT, 3 * UNIT]), SIZE - offset)
            start = rng.randrange(SIZE // UNIT) * UNIT
            match rng.randrange(9):
                case 0 | 1:
                    guest.flush(disk)
                case 2:
                    guest.write_zeroes(disk, offset, length)
                case 3:
                    guest.discard(disk, start, min(2 * UNIT, SIZE - start))
                case 4:
                    some = rng.sample(range(SIZE // UNIT), 4)
                    guest.writev(disk, [(n * UNIT + 7, rng.randbytes(300)) for n in some])
                case 5:
                    disk.metadata.commit()
                case _:
                    guest.write(disk, offset, rng.randbytes(length))
        if seed % 2:
            guest.flush(disk)
        disk.close()

    return workload


def check(content: bytes, backing: bytes | None = None, *, whole: bool = False) -> bytes:
    """What the disk reads as, if it is ``whole`` not only to SIZE. Raises AssertionError for a
    broken image."""
    lines = verify(content)[1]
    assert all(
        line == "ERROR image was not closed correctly" or "space leaked at the end" in line
        for line in lines
    ), lines
    file = MemoryFile(content)
    disk = open_image(file, backing)  # repairs
    found = disk.read(0, disk.size if whole else SIZE)
    disk.write(0, b"after the cut" * 100)
    disk.close()
    after, lines, _ = verify(bytes(file.content))
    assert (after.corruptions, after.leaks, lines) == (0, 0, [])
    _, _, repaired = verify(content, ALL)
    assert verify(repaired)[1] == []
    return found


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_power_cuts(seed):
    backing = random.Random(9).randbytes(SIZE) if seed == 4 else None
    by_cluster = seed != 2
    cuts = 0
    for cut in power_cuts(
        random_work(seed, backing=backing, prealloc=4096 * (seed % 3)),
        initial=empty_image(SIZE, by_cluster=by_cluster),
        guest_content=backing or bytes(SIZE),
        seed=seed,
    ):
        cut.verify(check(cut.content, backing))
        cuts += 1
    assert cuts > 60


@pytest.mark.parametrize("size", [5 * UNIT + 512, 64 * SIZE])
@pytest.mark.parametrize("way", ["clusters", "sectors", "old", "bitmap"])
def test_resizing(size, way):
    """The disk is there as a whole, in its old size or the new one, at every moment."""
    start = 0 if way == "old" else None
    file = MemoryFile(empty_image(SIZE, by_cluster=way in ("clusters", "bitmap"), data_start=start))
    disk = open_image(file)
    content = bytearray(SIZE)
    for block in (9, 0, 5, 2, 40, 1):
        data = random.Random(block).randbytes(UNIT)
        disk.write(block * UNIT, data)
        content[block * UNIT : (block + 1) * UNIT] = data
    disk.close()
    initial = bytes(file.content)
    if way == "bitmap":
        feature = bitmap_feature(SIZE // 512, [1], granularity=1)
        initial = with_extension(initial, feature)

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, prealloc=4096)
        disk.truncate(size)
        disk.close()

    sizes = set()
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(SIZE), subsets=4):
        found = check(cut.content, whole=True)
        sizes.add(len(found))
        kept = min(size, SIZE)
        assert found[:kept] == content[:kept], str(cut)
        if size < SIZE < len(found) + 1:
            # Before it is cut off, the end of the disk is only zeroed where its cluster stays.
            rest = slice(6 * UNIT, SIZE)
            assert found[rest] == content[rest], str(cut)
        assert not any(found[SIZE:])
    assert sizes == {SIZE, size}


def test_room_taken_before_clusters_left_is_found():
    """The proof can fail: without the order of moving the BAT overwrites data."""
    file = MemoryFile(empty_image(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * 5 * UNIT)
    disk.close()

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        disk.metadata.barrier = lambda: None
        disk.truncate(64 * SIZE)
        disk.close()

    def play() -> None:
        cuts = power_cuts(
            workload, initial=bytes(file.content), guest_content=bytes(SIZE), subsets=6
        )
        for cut in cuts:
            assert check(cut.content)[: 5 * UNIT] == b"x" * 5 * UNIT

    with pytest.raises(AssertionError):
        play()


def test_bitmaps_are_gone_before_they_are_wrong():
    """Whoever finds the extension finds the disk that it speaks of."""
    initial = with_extension(empty_image(SIZE), bitmap_feature(SIZE // 512, [1], granularity=1))

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        guest.write(disk, 0, b"x" * 3000)
        guest.flush(disk)
        guest.write(disk, 9000, b"y" * 3000)
        disk.close()

    kept = 0
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(SIZE)):
        disk = open_image(MemoryFile(cut.content), check=True)
        if disk.mapping.extension is not None:
            kept += 1
            assert disk.read(0, SIZE) == bytes(SIZE)
    assert kept


def test_entries_ahead_of_data_are_found():
    """The proof can fail: without the flush in front of the tables data leaks."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        disk.metadata.barrier = lambda: None
        for offset in range(0, SIZE, 3 * UNIT):
            guest.write(disk, offset, b"x" * 1500)
            guest.discard(disk, offset, UNIT)
            disk.mapping.flush()

    def play() -> None:
        for cut in power_cuts(
            workload, initial=empty_image(SIZE), guest_content=bytes(SIZE), subsets=6
        ):
            cut.verify(check(cut.content))

    with pytest.raises(AssertionError):
        play()
