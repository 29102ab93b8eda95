"""Power cuts under the engine: whatever reached storage, the image opens and flushed data is there.

Run on the sample format, so that this is about the engine's order of writes and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.testing import sample
from lamina.testing.crash import CrashFile, GuestLog, Step, power_cuts
from lamina.testing.memory import MemoryFile

UNIT = 1024
SIZE = 48 * UNIT
BELOW = random.Random(0).randbytes(SIZE)


def fresh() -> bytes:
    file = MemoryFile()
    sample.create(file, SIZE, UNIT, blocks=1000)
    return bytes(file.content)


def open_disk(file: Node, *, backed: bool = True) -> Disk:
    below = MemoryFile(BELOW, NodeOptions(read_only=True)) if backed else None
    return sample.open_disk(
        file, backing=below, options=NodeOptions(read_only=False, unmap=True)
    )


def random_work(seed: int, operations: int) -> Callable[[CrashFile, GuestLog], None]:
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_disk(file)
        for _ in range(operations):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, UNIT, 3 * UNIT]), SIZE - offset)
            unit = rng.randrange(SIZE // UNIT) * UNIT
            action = rng.randrange(12)
            if action < 5:
                guest.write(disk, offset, rng.randbytes(length))
            elif action == 5:
                blocks = rng.sample(range(SIZE // UNIT), 5)
                guest.writev(disk, [(b * UNIT + 7, rng.randbytes(300)) for b in blocks])
            elif action == 6:
                guest.write_compressed(disk, unit, bytes([rng.randrange(1, 256)]) * UNIT)
            elif action == 7:
                guest.write_zeroes(disk, offset, length)
            elif action == 8:
                guest.discard(disk, unit, min(2 * UNIT, SIZE - unit))
            elif action < 11:
                guest.flush(disk)
            else:
                disk.metadata.commit()
        disk.close()

    return workload


def verify(content: bytes) -> tuple[bytes, int]:
    """What the disk reads as; blocks leaked. Raises AssertionError for a broken image."""
    file = MemoryFile(content)
    leaks, errors = sample.check(file)
    assert errors == []
    disk = open_disk(file)
    found = disk.read(0, SIZE)
    # It can be written to, and stays whole.
    disk.write(0, b"after the cut" * 100)
    disk.flush()
    assert sample.check(file)[1] == []
    return found, leaks


def verify_all(
    workload: Callable[[CrashFile, GuestLog], None], *, seed: int = 0, subsets: int = 2
) -> int:
    """How many states there were, all of them allowed."""
    cuts = 0
    for cut in power_cuts(
        workload, initial=fresh(), guest_content=BELOW, seed=seed, subsets=subsets
    ):
        found, _ = verify(cut.content)
        cut.verify(found)
        cuts += 1
    return cuts


@pytest.mark.parametrize("seed", range(4))
def test_power_cuts(seed: int) -> None:
    assert verify_all(random_work(seed, 60), seed=seed) > 200


def test_a_clean_end_leaks_nothing() -> None:
    *_, last = power_cuts(
        random_work(99, 80),
        initial=fresh(),
        guest_content=BELOW,
        subsets=0,
    )
    assert last.outcome == "nothing kept", "the end is a flush"
    _, leaks = verify(last.content)
    assert leaks == 0


# -- the proof can fail ----------------------------------------------------------------------------


def test_flushed_data_that_is_missing_is_found() -> None:
    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_disk(file)
        guest.write(disk, 0, b"x" * UNIT)
        # Claims a flush that never was.
        guest.flushed.append((len(file.journal), 1, bytes(guest.content)))
        guest.write(disk, UNIT, b"y" * UNIT)
        disk.flush()

    with pytest.raises(AssertionError, match="neither old nor new"):
        verify_all(workload)


def test_tables_ahead_of_counts_are_found() -> None:
    """An engine that does not flush between the stages breaks images."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_disk(file)
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for unit in range(0, SIZE // UNIT, 3):
            guest.write(disk, unit * UNIT, b"x" * 100)
            disk.mapping.flush()

    with pytest.raises(AssertionError):
        verify_all(workload, subsets=8)


def test_the_journal_and_its_outcomes() -> None:
    def workload(file: CrashFile, guest: GuestLog) -> None:
        file.write(0, b"a" * 1024)
        file.flush()
        file.writev([(0, b"b" * 512), (2048, b"c" * 512)])
        file.truncate(1024)

    states = list(power_cuts(workload, initial=b"", guest_content=b"", subsets=3))
    contents = {(state.at, state.outcome): state.content for state in states}
    assert contents[0 + 1, "everything kept"] == b"a" * 1024
    assert contents[3, "everything kept"] == b"b" * 512 + b"a" * 512
    assert contents[4, "only the last one kept"] == (b"a" * 1024).ljust(2048, b"\0") + b"c" * 512
    assert contents[5, "everything kept"] == b"b" * 512 + b"a" * 512
    assert contents[5, "nothing kept"] == b"a" * 1024
    assert isinstance(CrashFile().journal, list)
    assert Step(0, None).data is None
