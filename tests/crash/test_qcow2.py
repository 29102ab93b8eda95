"""Power cuts while a qcow2 image is written to: it stays whole, at most space leaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from lamina.block.limits import Preallocation
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, verify

SIZE = 96 << 10
BELOW = random.Random(1).randbytes(SIZE)
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")

Workload = Callable[[CrashFile, GuestLog], None]


def open_disk(file: Node, **runtime: str) -> Disk:
    below = MemoryFile(BELOW, NodeOptions(read_only=True))
    return open_image(file, backing=below, node_options=WRITABLE, **runtime)


def random_work(seed: int, operations: int, unit: int, **runtime: str) -> Workload:
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_disk(file, **runtime)
        units = SIZE // unit
        for _ in range(operations):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, unit, 3 * unit]), SIZE - offset)
            start = rng.randrange(units) * unit
            action = rng.randrange(12)
            if action < 5:
                guest.write(disk, offset, rng.randbytes(length))
            elif action == 5:
                some = rng.sample(range(units), 5)
                guest.writev(disk, [(n * unit + 7, rng.randbytes(300)) for n in some])
            elif action == 6:
                guest.write_compressed(disk, start, bytes([rng.randrange(1, 256)]) * unit)
            elif action == 7:
                guest.write_zeroes(disk, offset, length)
            elif action == 8:
                guest.discard(disk, start, min(2 * unit, SIZE - start))
            elif action < 11:
                guest.flush(disk)
            else:
                disk.metadata.commit()
        disk.close()

    return workload


def check(content: bytes) -> tuple[bytes, int]:
    """What the disk reads as; clusters leaked. Raises AssertionError for a broken image."""
    verdict = verify(content)
    assert verdict.errors == []
    file = MemoryFile(content)
    disk = open_disk(file)
    found = disk.read(0, SIZE)
    # It can be written to, and stays whole.
    disk.write(0, b"after the cut" * 100)
    disk.close()
    assert verify(bytes(file.content)).errors == []
    return found, len(verdict.leaks)


CASES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"cluster_size": 512}, {}),
    ({"cluster_size": 1024, "refcount_bits": 1}, {}),
    ({"cluster_size": 512, "refcount_bits": 64}, {"discard_no_unref": "on"}),
    ({"cluster_size": 2048, "compat": "0.10"}, {"pass_discard_other": "on"}),
    ({"cluster_size": 16384, "extended_l2": True}, {"pass_discard_other": "on"}),
    (
        {"cluster_size": 16384, "extended_l2": True, "preallocation": "metadata"},
        {"discard_no_unref": "on", "l2_cache_entry_size": "512"},
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_power_cuts(number: int) -> None:
    created, runtime = CASES[number]
    unit = created["cluster_size"]
    initial = make(SIZE, backing_file="below", backing_fmt="raw", **created)
    cuts = 0
    for cut in power_cuts(
        random_work(number, 40, unit, **runtime),
        initial=initial,
        guest_content=BELOW,
        seed=number,
    ):
        found, _ = check(cut.content)
        cut.verify(found)
        cuts += 1
    assert cuts > 100


def test_a_clean_end_leaks_nothing() -> None:
    initial = make(SIZE, cluster_size=512, backing_file="below", backing_fmt="raw")
    *_, last = power_cuts(
        random_work(99, 120, 512), initial=initial, guest_content=BELOW, subsets=0
    )
    found, leaks = check(last.content)
    last.verify(found)
    assert leaks == 0


@pytest.mark.parametrize("mode", ["metadata", "falloc"])
@pytest.mark.parametrize("lazy", [False, True])
def test_places_taken_beforehand(mode: str, lazy: bool) -> None:
    """No table names what the file does not reach, however far growing has come."""
    size = 8 << 10

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, node_options=WRITABLE)
        guest.write(disk, 0, b"a" * 2000)
        guest.flush(disk)
        disk.truncate(size * 12, Preallocation(mode))
        disk.truncate(size * 2)
        disk.truncate(size)
        disk.truncate(size * 5, Preallocation(mode))
        guest.flush(disk)
        disk.close()

    initial = make(size, cluster_size=512, preallocation="metadata", lazy_refcounts=lazy)
    cuts = 0
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(size), seed=7):
        errors = verify(cut.content).errors
        # Lazy counts are wrong until they are repaired; what tables name is there all the same.
        assert [one for one in errors if not lazy or "behind the end" in one] == []
        file = MemoryFile(cut.content)
        disk = open_image(file, node_options=WRITABLE)
        cut.verify(disk.read(0, size))
        disk.close()
        assert verify(bytes(file.content)).errors == []
        cuts += 1
    assert cuts > 30


def test_resizing_and_growing_tables() -> None:
    """The refcount table and the L1 table move; the disk grows and shrinks."""
    size = 64 << 10

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, node_options=WRITABLE)
        guest.write(disk, 0, b"a" * 2000)
        guest.flush(disk)
        # Many clusters behind the disk: both tables have to grow. 4096 clusters fill the first
        # cluster of the refcount table.
        disk.write_vmstate(0, memoryview(b"v" * 40_000))
        disk.flush()
        disk.write_vmstate(1 << 20, memoryview(b"v" * (512 * 4000)))
        guest.write(disk, 4096, b"b" * 3000)
        guest.flush(disk)
        disk.truncate(size * 8)
        disk.truncate(size)
        guest.flush(disk)
        disk.close()

    initial = make(size, cluster_size=512, refcount_bits=64)
    ends = set()
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(size), subsets=1):
        assert verify(cut.content).errors == []
        disk = open_image(MemoryFile(cut.content), node_options=WRITABLE)
        assert disk.size in (size, size * 8)
        ends.add(disk.size)
        cut.verify(disk.read(0, size))
    assert ends == {size, size * 8}


def test_tables_ahead_of_counts_are_found() -> None:
    """The proof can fail: without the flushes between the stages images break."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_disk(file)
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for unit in range(0, SIZE, 1536):
            guest.write(disk, unit, b"x" * 100)
            disk.mapping.flush()

    initial = make(SIZE, cluster_size=512, backing_file="below", backing_fmt="raw")

    def play() -> None:
        for cut in power_cuts(workload, initial=initial, guest_content=BELOW, subsets=8):
            check(cut.content)

    with pytest.raises(AssertionError):
        play()
