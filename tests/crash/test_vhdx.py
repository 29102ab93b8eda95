"""Power cuts while a VHDX image is written to: its log replays, in the file and in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from lamina.block.driver import Fix
from lamina.errors import ImageCorrupt
from lamina.formats.vhdx import DRIVER
from lamina.formats.vhdx.check import check
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB
from tests.unit.vhdx.images import READ_ONLY, filled, make, open_image

SIZE = 2 * MIB + 64 * KIB
STEP = 32 * KIB
BELOW = random.Random(1).randbytes(SIZE)

Workload = Callable[[CrashFile, GuestLog], None]


def random_work(seed: int, operations: int, parent: bytes | None) -> Workload:
    """Small requests near the start of each block: what they leave out costs little."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file, parent=parent)
        for _ in range(operations):
            block = rng.randrange(3) * MIB
            offset = block + rng.randrange(STEP)
            length = min(rng.choice([1, 100, 512, 5000]), SIZE - offset)
            action = rng.randrange(10)
            if action < 4:
                guest.write(disk, offset, rng.randbytes(length))
            elif action == 4:
                some = [n * MIB + rng.randrange(STEP) for n in range(2)]
                guest.writev(disk, [(at, rng.randbytes(300)) for at in some])
            elif action == 5:
                guest.write_zeroes(disk, block, min(MIB, SIZE - block))
            elif action == 6:
                guest.discard(disk, block, min(MIB, SIZE - block))
            elif action < 9:
                guest.flush(disk)
            else:
                disk.metadata.commit()
        disk.close()

    return workload


def read_after(content: bytes, parent: bytes | None, size: int = SIZE) -> bytes:
    """What the disk reads as; both ways of replaying agree, and the image stays whole."""
    file = MemoryFile(content)
    disk = open_image(file, parent=parent, node_options=READ_ONLY)
    found = disk.read(0, size)
    disk.close()
    assert file.content == content, "reading changed the file"
    disk = open_image(file, parent=parent)
    assert disk.read(0, size) == found
    whole(disk)
    disk.write(MIB - 100, b"after the cut" * 20)
    disk.flush()
    whole(disk)
    disk.close()
    return found


def whole(disk: Any) -> None:
    lines: list[str] = []
    result = check(disk.mapping, Fix(), lines.append)
    assert (result.corruptions, lines) == (0, [])


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing", "large sectors"])
def test_power_cuts(kind: str) -> None:
    sector = 4096 if kind == "large sectors" else 512
    parent, below = None, bytes(SIZE)
    if kind not in ("dynamic", "fixed"):
        parent, below = filled(make(SIZE, logical_sector_size=sector), BELOW), BELOW
    subformat = "fixed" if kind == "fixed" else None
    initial = make(SIZE, parent=parent, subformat=subformat, logical_sector_size=sector)
    cuts = 0
    workload = random_work(len(kind), 9 if sector == 4096 else 14, parent)
    for cut in power_cuts(workload, initial=initial, guest_content=below, seed=3, subsets=1):
        cut.verify(read_after(cut.content, parent))
        cuts += 1
    assert cuts > 50


def test_resizing_moves_the_table() -> None:
    """The BAT of a huge disk does not fit any more; the new one takes over in one moment."""
    size = 128 << 30

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        guest.write(disk, 0, b"a" * 2000)
        guest.flush(disk)
        disk.truncate(size)
        guest.write(disk, MIB, b"b" * 2000)
        guest.flush(disk)
        disk.truncate(2 * MIB)
        guest.flush(disk)
        disk.close()

    initial = make(2 * MIB)
    sizes = set()
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(2 * MIB), subsets=0):
        disk = open_image(MemoryFile(cut.content), node_options=READ_ONLY)
        sizes.add(disk.size)
        disk.close()
        cut.verify(read_after(cut.content, None, 2 * MIB))
    assert sizes == {2 * MIB, size}


def test_shrinking_gives_bitmaps_back() -> None:
    """Each describes 4 GiB: the second one goes, its space is used again, the disk grows again."""
    size, head = 5 << 30, 2 * MIB
    parent = filled(make(size), BELOW[:head])

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, parent=parent)
        guest.write(disk, 100, b"a" * 1000)
        disk.write(size - MIB + 100, b"far" * 100)
        guest.flush(disk)
        disk.truncate(head)
        guest.write(disk, MIB - 100, b"b" * 1000)
        guest.flush(disk)
        disk.truncate(size)
        disk.write(size - MIB + 5000, b"far" * 100)
        guest.flush(disk)
        disk.close()

    initial = make(size, parent=parent)
    for cut in power_cuts(workload, initial=initial, guest_content=BELOW[:head], subsets=0):
        cut.verify(read_after(cut.content, parent, head))


def test_losing_the_parent() -> None:
    """All that is not here is zeroes below, as it is after a rebase; old data lies in the place of
    some of it."""
    parent = filled(make(SIZE), bytes(MIB) + BELOW[MIB:])
    below = bytes(MIB) + BELOW[MIB:]
    file = MemoryFile(make(SIZE, parent=parent))
    disk = open_image(file, parent=parent)
    disk.write(0, b"old" * MIB)
    disk.discard(0, 2 * MIB)
    disk.flush()
    disk.write(100, b"mine" * 5000)
    disk.write(MIB, BELOW[MIB:])
    disk.close()
    content = b"".join([bytes(100), b"mine" * 5000, bytes(MIB - 20100), below[MIB:]])

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, parent=parent)
        DRIVER.change_backing_file(disk, None, None)
        assert disk.read(0, SIZE) == content
        disk.close()

    parents = set()
    for cut in power_cuts(workload, initial=bytes(file.content), guest_content=content):
        disk = open_image(MemoryFile(cut.content), parent=parent, node_options=READ_ONLY)
        parents.add((disk.mapping.differencing, bool(disk.mapping.image.parent)))
        disk.close()
        assert read_after(cut.content, parent) == content
    assert parents == {(True, True), (False, False)}


def test_tables_ahead_of_the_log_are_found() -> None:
    """The proof can fail: without the flushes around the log images break."""
    parent = filled(make(SIZE), BELOW)

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, parent=parent)
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for block in range(3):
            guest.write(disk, block * MIB, b"x" * 5000)
            disk.mapping.flush()

    initial = make(SIZE, parent=parent)

    def play() -> None:
        for cut in power_cuts(workload, initial=initial, guest_content=BELOW, subsets=6):
            cut.verify(read_after(cut.content, parent))

    with pytest.raises((AssertionError, ImageCorrupt)):
        play()
