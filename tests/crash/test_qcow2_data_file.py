"""Power cuts while the guest data lies in a second file: two files, flushed one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.block.limits import WriteFlags
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.qcow2 import DRIVER
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, verify

SIZE = 96 << 10
BELOW = random.Random(1).randbytes(SIZE)
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")

KINDS: list[tuple[dict[str, Any], bool]] = [
    ({"cluster_size": 512}, True),
    ({"cluster_size": 16384, "extended_l2": True}, True),
    ({"cluster_size": 1024, "data_file_raw": True}, False),
    ({"cluster_size": 16384, "extended_l2": True, "data_file_raw": True}, False),
]
"""Creation options, whether there is a backing file."""


def open_disk(file: Node, data: Node, *, backed: bool, **runtime: str) -> Disk:
    below = MemoryFile(BELOW, NodeOptions(read_only=True)) if backed else None
    return open_image(file, backing=below, data=data, node_options=WRITABLE, **runtime)


def new_image(options: dict[str, Any], *, backed: bool) -> tuple[bytes, bytes]:
    data = MemoryFile()
    if backed:
        options = {**options, "backing_file": "below", "backing_fmt": "raw"}
    return make(SIZE, data=data, **options), bytes(data.content)


def scribble(disk: Disk, guest: GuestLog, rng: random.Random, operations: int) -> None:
    unit = disk.allocation_unit
    for _ in range(operations):
        offset = rng.randrange(SIZE - 1)
        length = min(rng.choice([1, 100, unit, 3 * unit]), SIZE - offset)
        start = rng.randrange(SIZE // unit) * unit
        action = rng.randrange(11)
        if action < 5:
            guest.write(disk, offset, rng.randbytes(length))
        elif action == 5:
            # Given up and taken again, before anybody knows of it.
            guest.discard(disk, start, unit)
            guest.write(disk, start + 7, rng.randbytes(50))
        elif action == 6:
            guest.write_zeroes(disk, offset, length)
        elif action == 7:
            guest.write_zeroes(disk, offset, length, WriteFlags.NONE)
        elif action == 8:
            guest.discard(disk, start, min(2 * unit, SIZE - start))
        elif action == 9:
            guest.flush(disk)
        else:
            disk.metadata.commit()


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_power_cuts(number: int) -> None:
    options, backed = KINDS[number]

    def workload(file: CrashFile, guest: GuestLog) -> None:
        assert file.beside is not None
        disk = open_disk(file, file.beside, backed=backed)
        scribble(disk, guest, random.Random(number), 40)
        disk.close()

    initial, data = new_image(options, backed=backed)
    content = BELOW if backed else bytes(SIZE)
    cuts = 0
    for cut in power_cuts(workload, initial=initial, guest_content=content, beside=data):
        assert verify(cut.content).errors == []
        file, beside = MemoryFile(cut.content), MemoryFile(cut.beside)
        disk = open_disk(file, beside, backed=backed)
        cut.verify(disk.read(0, SIZE))
        if options.get("data_file_raw"):
            cut.verify(bytes(beside.content[:SIZE]))
        disk.write(0, b"after the cut" * 100)
        disk.close()
        assert verify(bytes(file.content)).errors == []
        cuts += 1
    assert cuts > 60


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_clean_end_leaks_nothing_and_raw_files_are_the_disk(number: int) -> None:
    options, backed = KINDS[number]

    def workload(file: CrashFile, guest: GuestLog) -> None:
        assert file.beside is not None
        disk = open_disk(file, file.beside, backed=backed)
        scribble(disk, guest, random.Random(100 + number), 120)
        disk.close()

    initial, data = new_image(options, backed=backed)
    content = BELOW if backed else bytes(SIZE)
    *_, last = power_cuts(
        workload, initial=initial, guest_content=content, subsets=0, beside=data
    )
    assert verify(last.content) == ([], [])
    beside = MemoryFile(last.beside)
    found = open_disk(MemoryFile(last.content), beside, backed=backed).read(0, SIZE)
    assert found == last.guest.content
    if options.get("data_file_raw"):
        assert beside.content[:SIZE] == found


def test_resizing() -> None:
    """The L1 table has to move."""
    sizes = set()

    def workload(file: CrashFile, guest: GuestLog) -> None:
        assert file.beside is not None
        disk = open_disk(file, file.beside, backed=False)
        guest.write(disk, 0, b"a" * 5000)
        guest.write(disk, SIZE - 3000, b"z" * 3000)
        guest.flush(disk)
        disk.truncate(2 * SIZE)
        disk.truncate(SIZE)
        guest.flush(disk)
        disk.close()

    initial, data = new_image({"cluster_size": 512, "data_file_raw": True}, backed=False)
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(SIZE), beside=data):
        assert verify(cut.content).errors == []
        disk = open_disk(MemoryFile(cut.content), MemoryFile(cut.beside), backed=False)
        sizes.add(disk.size)
        cut.verify(disk.read(0, SIZE))
        assert not any(disk.read(SIZE, disk.size - SIZE))
    assert sizes == {SIZE, 2 * SIZE}


def test_emptying_an_overlay_keeps_its_data_until_nothing_names_it() -> None:
    options, _ = KINDS[0]
    initial, data = new_image(options, backed=True)
    file, beside = MemoryFile(initial), MemoryFile(data)
    disk = open_disk(file, beside, backed=True)
    disk.write(0, b"on top" * 1000)
    disk.close()
    written = b"on top" * 1000 + BELOW[6000:]

    def workload(file: CrashFile, guest: GuestLog) -> None:
        assert file.beside is not None
        disk = open_disk(file, file.beside, backed=True)
        DRIVER.make_empty(disk)
        disk.close()

    seen = set()
    given_back = False
    for cut in power_cuts(
        workload,
        initial=bytes(file.content),
        guest_content=written,
        beside=bytes(beside.content),
    ):
        assert verify(cut.content).errors == []
        found = open_disk(MemoryFile(cut.content), MemoryFile(cut.beside), backed=True)
        seen.add(found.read(0, SIZE))
        given_back |= not any(cut.beside)
    assert seen == {written, BELOW}
    assert given_back


def test_tables_ahead_of_data_are_found() -> None:
    """The proof can fail: without a flush of the data file, tables name data that is not there."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        assert file.beside is not None
        disk = open_disk(file, file.beside, backed=True)
        for unit in range(0, SIZE, 1536):
            guest.write(disk, unit, b"x" * 100)
            disk.metadata._unflushed.pop(id(file.beside), None)
            disk.mapping.flush()

    initial, data = new_image({"cluster_size": 512}, backed=True)

    def play() -> None:
        for cut in power_cuts(workload, initial=initial, guest_content=BELOW, beside=data):
            disk = open_disk(MemoryFile(cut.content), MemoryFile(cut.beside), backed=True)
            cut.verify(disk.read(0, SIZE))

    with pytest.raises(AssertionError):
        play()
