"""Power cuts while snapshots are made, applied and deleted."""

from __future__ import annotations

import random

import pytest

from lamina.block.info import SnapshotInfo
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.qcow2 import DRIVER
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, read_only, verify

SIZE = 64 << 10
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def take(disk: Disk, name: str) -> None:
    DRIVER.create_snapshot(disk, SnapshotInfo("", name, 0, 1, 0, 0, 0))


def scribble(disk: Disk, guest: GuestLog, rng: random.Random, operations: int) -> None:
    for _ in range(operations):
        offset = rng.randrange(SIZE - 3000)
        guest.write(disk, offset, bytes([rng.randrange(1, 200)]) * rng.choice([1, 700, 3000]))
        unit = rng.randrange(SIZE // disk.mapping.unit) * disk.mapping.unit
        if rng.random() < 0.3:
            guest.write_compressed(disk, unit, bytes([rng.randrange(200)]) * disk.mapping.unit)
    guest.flush(disk)


def snapshots_of(content: bytes) -> dict[str, bytes]:
    """Name -> content, of a repaired image."""
    found = {}
    for name in [one.name for one in open_image(read_only(content)).info().snapshots]:
        disk = open_image(read_only(content))
        DRIVER.load_snapshot(disk, name)
        found[name] = disk.read(0, disk.size)
    return found


@pytest.mark.parametrize(
    "created",
    [
        {"cluster_size": 512},
        {"cluster_size": 1024, "refcount_bits": 8, "lazy_refcounts": True},
        {"cluster_size": 512, "compat": "0.10"},
    ],
    ids=["v3", "lazy", "v2"],
)
@pytest.mark.parametrize("seed", range(2))
def test_power_cuts(created, seed):
    states: dict[str, bytes] = {}
    """What each snapshot must hold."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file, node_options=WRITABLE)
        scribble(disk, guest, rng, 6)
        for name in ("one", "two"):
            states[name] = bytes(guest.content)
            take(disk, name)
            scribble(disk, guest, rng, 6)
        # Applying replaces everything: the guest may see what was or what will be.
        guest._begin(0, states["one"])
        DRIVER.apply_snapshot(disk, "one")
        guest._end(0, states["one"])
        guest.flush(disk)
        scribble(disk, guest, rng, 4)
        DRIVER.delete_snapshot(disk, "one")
        scribble(disk, guest, rng, 4)
        DRIVER.delete_snapshot(disk, "two")
        disk.close()

    cuts = 0
    seen = set()
    for cut in power_cuts(
        workload, initial=make(SIZE, **created), guest_content=bytes(SIZE), seed=seed, subsets=1
    ):
        file = MemoryFile(cut.content)
        disk = open_image(file, node_options=WRITABLE)  # repairs what is marked as dirty
        cut.verify(disk.read(0, SIZE))
        disk.close()
        repaired = bytes(file.content)
        errors = verify(repaired).errors
        if created.get("compat") == "0.10":
            # Version 2 cannot be marked: flags may be too careful, which harms nobody.
            errors = [one for one in errors if "COPIED=False" not in one]
        assert errors == [], str(cut)
        for name, content in snapshots_of(repaired).items():
            assert content == states[name], f"snapshot {name}, {cut}"
            seen.add(name)
        cuts += 1
    assert cuts > 100
    assert seen == {"one", "two"}


def test_deleted_snapshots_leave_nothing_behind():
    file = MemoryFile(make(SIZE, cluster_size=512))
    disk = open_image(file, node_options=WRITABLE)
    rng = random.Random(7)
    content = bytearray(SIZE)
    for round in range(30):
        offset = rng.randrange(SIZE - 2000)
        content[offset : offset + 2000] = bytes([round + 1]) * 2000
        disk.write(offset, bytes([round + 1]) * 2000)
        if round % 3 == 0:
            take(disk, f"s{round}")
        if round % 5 == 4:
            DRIVER.delete_snapshot(disk, disk.info().snapshots[0].id)
        assert disk.read(0, SIZE) == content
    while disk.info().snapshots:
        DRIVER.delete_snapshot(disk, disk.info().snapshots[-1].id)
    assert disk.read(0, SIZE) == content
    disk.close()
    assert verify(bytes(file.content)) == ([], [])
