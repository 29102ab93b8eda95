"""Power cuts while a QED image is written to: marked for a check, it is whole, at most longer."""

from __future__ import annotations

import random

import pytest

from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qed.images import UNIT, check, make, open_image

SIZE = 96 << 10
BELOW = random.Random(1).randbytes(SIZE)


def random_work(seed: int, operations: int, backing: bytes | None):
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file, backing)
        for _ in range(operations):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, UNIT, 3 * UNIT]), SIZE - offset)
            match rng.randrange(8):
                case 0:
                    guest.write_zeroes(disk, offset, length)
                case 1:
                    guest.discard(disk, offset // UNIT * UNIT, 2 * UNIT)
                case 2 | 3:
                    guest.flush(disk)
                case _:
                    guest.write(disk, offset, rng.randbytes(length))
        guest.flush(disk)
        disk.close()

    return workload


@pytest.mark.parametrize("backed", [False, True])
def test_power_cuts(backed: bool) -> None:
    below = BELOW if backed else None
    initial = make(SIZE, **({"backing_file": "below", "backing_fmt": "raw"} if backed else {}))
    cuts = marked = 0
    for cut in power_cuts(
        random_work(int(backed), 30, below),
        initial=initial,
        guest_content=BELOW if backed else bytes(SIZE),
    ):
        result, _ = check(cut.content)
        assert result.corruptions == 0
        file = MemoryFile(cut.content)
        if result.leaks:
            assert file.content[16] & 2, "nobody will look for the leaks"
        disk = open_image(file, below)
        cut.verify(disk.read(0, SIZE))
        marked += bool(result.leaks)
        disk.write(0, b"after the cut" * 100)
        disk.close()
        assert check(file.content)[0].corruptions == 0
        cuts += 1
    assert cuts > 80
    assert marked > 5


def test_tables_ahead_of_data_are_found() -> None:
    """The proof can fail: without the flushes between the stages images break."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, BELOW)
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for offset in range(0, SIZE, 2 * UNIT):
            guest.write(disk, offset, b"x" * 100)
            disk.mapping.flush()

    initial = make(SIZE, backing_file="below", backing_fmt="raw")

    def play() -> None:
        for cut in power_cuts(workload, initial=initial, guest_content=BELOW, subsets=8):
            assert check(cut.content)[0].corruptions == 0
            cut.verify(open_image(MemoryFile(cut.content), BELOW).read(0, SIZE))

    with pytest.raises(AssertionError):
        play()
