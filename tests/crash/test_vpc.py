"""Power cuts while a VHD image is written to, resized and rebased: blocks never share a place, and
there is a footer that can be believed."""

from __future__ import annotations

import random

import pytest

from lamina.errors import LaminaError
from lamina.formats.vpc import DRIVER
from lamina.formats.vpc.layout import DIFFERENCING, DYNAMIC
from lamina.formats.vpc.mapping import DynamicMapping
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.vpc.images import ID, UNIT, check, fixed, make, open_image

SIZE = 24 * UNIT
BELOW = random.Random(1).randbytes(SIZE)


def opened(file: MemoryFile, backed: bool):
    return open_image(file, MemoryFile(BELOW) if backed else None)


def random_work(seed: int, operations: int, backed: bool):
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = opened(file, backed)
        for _ in range(operations):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, UNIT, 3 * UNIT]), SIZE - offset)
            match rng.randrange(7):
                case 0:
                    guest.write_zeroes(disk, offset, length)
                case 1 | 2:
                    guest.flush(disk)
                case _:
                    guest.write(disk, offset, rng.randbytes(length))
        guest.flush(disk)
        disk.close()

    return workload


def sound(content: bytes) -> None:
    """Nothing but a footer that was overwritten."""
    _, lines, _ = check(content)
    assert set(lines) <= {"ERROR: the footer at the end of the file is damaged"}, lines


@pytest.mark.parametrize("backed", [False, True])
def test_power_cuts(backed: bool) -> None:
    initial = make(SIZE, parent=ID if backed else b"")
    cuts = 0
    for cut in power_cuts(
        random_work(int(backed), 30, backed),
        initial=initial,
        guest_content=BELOW if backed else bytes(SIZE),
    ):
        sound(cut.content)
        file = MemoryFile(cut.content)
        disk = opened(file, backed)
        cut.verify(disk.read(0, SIZE))
        disk.write(0, b"after the cut" * 100)
        disk.close()
        assert check(file.content)[1] == []
        cuts += 1
    assert cuts > 80


@pytest.mark.parametrize("size", [4 * UNIT, 2000 * UNIT])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_resizing(kind: str, size: int) -> None:
    file = MemoryFile(make(SIZE) if kind == "dynamic" else fixed(SIZE))
    disk = open_image(file)
    disk.write(UNIT, BELOW[UNIT : SIZE - UNIT])
    disk.close()
    kept = min(size, SIZE - UNIT)

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        disk.truncate(size)
        disk.close()

    sizes = set()
    for cut in power_cuts(
        workload, initial=bytes(file.content), guest_content=bytes(SIZE), subsets=3
    ):
        disk = open_image(MemoryFile(cut.content))
        sizes.add(disk.size)
        assert disk.read(UNIT, kept - UNIT) == BELOW[UNIT:kept]
        if kind == "dynamic":
            _, lines, _ = check(cut.content)
            assert not any("overlaps" in line or "metadata" in line for line in lines)
    assert sizes == {SIZE, size}


def test_changing_the_parent() -> None:
    """The id of a parent never stands beside the name of another one."""
    file = MemoryFile(make(SIZE, parent=ID))
    disk = opened(file, True)
    disk.write(5000, b"mine" * 500)
    disk.close()
    content = BELOW[:5000] + b"mine" * 500 + BELOW[7000:]
    other = make(SIZE, identity=b"another identity")

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, MemoryFile(BELOW), parent=MemoryFile(other))
        DRIVER.change_backing_file(disk, "directory/other.vhd", "vpc")
        disk.close()

    parents = set()
    for cut in power_cuts(
        workload, initial=bytes(file.content), guest_content=content, subsets=8
    ):
        file = MemoryFile(cut.content)
        disk = opened(file, True)
        assert disk.read(0, SIZE) == content
        mapping = disk.mapping
        assert isinstance(mapping, DynamicMapping)
        parents.add((mapping.header.parent_id, mapping.backing_name))
        disk.write(20000, b"after the cut" * 500)
        disk.close()
        _, lines, _ = check(file.content)
        assert lines == []
    assert parents == {(ID, "below.vhd"), (b"another identity", "directory/other.vhd")}


def test_losing_the_parent() -> None:
    """All that is not here is zeroes below, as it is after a rebase; old data lies in the place of
    some of it."""
    below = bytes(3 * UNIT) + BELOW[3 * UNIT : 6 * UNIT] + bytes(SIZE - 6 * UNIT)
    content = bytearray(below)
    file = MemoryFile(make(SIZE, parent=ID) + b"old" * 4 * UNIT)
    disk = open_image(file, MemoryFile(below))
    for offset in (1, 3 * UNIT, 4 * UNIT, 5 * UNIT, 9 * UNIT + 600):
        data = BELOW[offset : offset + UNIT]
        disk.write(offset, data)
        content[offset : offset + UNIT] = data
    disk.close()

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, MemoryFile(below))
        DRIVER.change_backing_file(disk, None, None)
        assert disk.read(0, SIZE) == content
        disk.close()

    types = set()
    for cut in power_cuts(
        workload, initial=bytes(file.content), guest_content=bytes(content), subsets=8
    ):
        file = MemoryFile(cut.content)
        disk = open_image(file, MemoryFile(below))
        assert disk.read(0, SIZE) == content
        mapping = disk.mapping
        assert isinstance(mapping, DynamicMapping)
        types.add((mapping.footer.disk_type, mapping.header.parent_id))
        disk.write(20000, b"after the cut" * 500)
        disk.close()
        assert check(file.content)[1] == []
    assert types == {(DIFFERENCING, ID), (DYNAMIC, bytes(16))}


def test_entries_ahead_of_data_are_found() -> None:
    """The proof can fail: without the flushes between the stages images break."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = opened(file, True)
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for offset in range(0, SIZE, 2 * UNIT):
            guest.write(disk, offset, b"x" * 1000)
            disk.mapping.flush()

    def play() -> None:
        for cut in power_cuts(
            workload, initial=make(SIZE, parent=ID), guest_content=BELOW, subsets=8
        ):
            cut.verify(opened(MemoryFile(cut.content), True).read(0, SIZE))

    with pytest.raises((AssertionError, LaminaError)):
        play()
