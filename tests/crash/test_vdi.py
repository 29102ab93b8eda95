"""Power cuts while a VDI image is written to, resized and repaired: its map never lies."""

from __future__ import annotations

import random

import pytest

from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.vdi.images import LEAKS, UNIT, check, make, open_image

SIZE = 3 * UNIT


def sound(content: bytes) -> None:
    """Nothing but a count of blocks that nobody names, and that can be repaired."""
    _, lines, _ = check(content)
    assert all(line.startswith("ERROR: allocated blocks mismatch") for line in lines), lines
    if lines:
        _, _, fixed = check(content, LEAKS)
        assert check(fixed)[1] == []


@pytest.mark.parametrize("seed", range(2))
def test_power_cuts(seed: int) -> None:
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file)
        for _ in range(12):
            offset = rng.randrange(SIZE - 9000)
            match rng.randrange(5):
                case 0:
                    guest.write_zeroes(disk, offset, rng.randrange(1, 9000))
                case 1:
                    guest.flush(disk)
                case _:
                    guest.write(disk, offset, rng.randbytes(rng.randrange(1, 9000)))
        guest.flush(disk)
        disk.close()

    cuts = 0
    for cut in power_cuts(workload, initial=make(SIZE), guest_content=bytes(SIZE), seed=seed):
        sound(cut.content)
        disk = open_image(MemoryFile(cut.content))
        cut.verify(disk.read(0, SIZE))
        disk.write(UNIT, b"after the cut")
        disk.close()
        cuts += 1
    assert cuts > 20


@pytest.mark.parametrize("size", [UNIT, 2 * UNIT + 512, 140 * UNIT])
def test_resizing(size: int) -> None:
    """What is moved to make room, or to fill gaps, is there all the time."""
    file = MemoryFile(make(SIZE))
    disk = open_image(file)
    for block in (2, 0, 1):
        disk.write(block * UNIT, bytes([block + 1]) * UNIT)
    disk.close()
    kept = min(size, SIZE)

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        disk.truncate(size)
        disk.close()

    sizes = set()
    for cut in power_cuts(
        workload, initial=bytes(file.content), guest_content=bytes(SIZE), subsets=1
    ):
        sound(cut.content)
        disk = open_image(MemoryFile(cut.content))
        sizes.add(disk.size)
        for block in range(kept // UNIT):
            assert disk.read(block * UNIT, UNIT) == bytes([block + 1]) * UNIT
    assert sizes == {SIZE, size}
