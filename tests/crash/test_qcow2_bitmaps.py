"""Power cuts while bitmaps record, are stored, added, merged and removed.

Whatever is left, a bitmap that the file does not call in use tells of every change of the disk, and
nothing but space is lost.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.block.driver import find_bitmap
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.qcow2 import DRIVER
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, read_only, verify

SIZE = 64 << 10
UNIT = 512
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def with_bitmap(**created: Any) -> bytes:
    """An empty disk, and a bitmap ``first`` that records."""
    file = MemoryFile(make(SIZE, **created))
    disk = open_image(file, node_options=WRITABLE)
    DRIVER.add_bitmap(disk, "first", UNIT)
    disk.close()
    return bytes(file.content)


def scribble(disk: Disk, guest: GuestLog, rng: random.Random, operations: int) -> None:
    for _ in range(operations):
        offset = rng.randrange(SIZE - 3000)
        guest.write(disk, offset, bytes([rng.randrange(1, 200)]) * rng.choice([1, 700, 3000]))


def changed(found: bytes, since: bytes) -> set[int]:
    """The granules that differ."""
    return {
        start // UNIT
        for start in range(0, SIZE, UNIT)
        if found[start : start + UNIT] != since[start : start + UNIT]
    }


def dirty(disk: Disk, name: str) -> set[int]:
    return {
        granule
        for offset, length in find_bitmap(disk, name).ranges()
        for granule in range(offset // UNIT, (offset + length) // UNIT)
    }


CASES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    # The header takes several sectors, and the extension lies in the second one.
    {"cluster_size": 64 << 10},
    {"cluster_size": 8192, "backing_file": "b" * 300, "backing_fmt": "raw"},
    {"cluster_size": 1024, "lazy_refcounts": True},
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_power_cuts(number: int) -> None:
    created = CASES[number]
    since: dict[str, bytes] = {"first": bytes(SIZE)}
    """What the disk held when a bitmap began to record."""
    merged: list[set[int]] = [set()]

    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(number)
        disk = open_image(file, backing=below(), node_options=WRITABLE)
        scribble(disk, guest, rng, 3)
        guest.flush(disk)
        since["second"] = bytes(guest.content)
        DRIVER.add_bitmap(disk, "second", UNIT)
        scribble(disk, guest, rng, 2)
        DRIVER.store_bitmaps(disk)
        scribble(disk, guest, rng, 2)
        DRIVER.add_bitmap(disk, "sum", UNIT)
        DRIVER.enable_bitmap(disk, "sum", False)
        merged.append(dirty(disk, "first"))
        DRIVER.merge_bitmap(disk, "sum", disk, "first")
        disk.close()
        disk = open_image(file, backing=below(), node_options=WRITABLE)
        scribble(disk, guest, rng, 2)
        guest.flush(disk)
        DRIVER.remove_bitmap(disk, "second")
        scribble(disk, guest, rng, 1)
        merged.append(dirty(disk, "first"))
        DRIVER.merge_bitmap(disk, "sum", disk, "first")
        disk.close()
        disk = open_image(file, backing=below(), node_options=WRITABLE)
        for name in ("sum", "first"):
            DRIVER.remove_bitmap(disk, name)
        disk.close()

    def below() -> MemoryFile:
        return MemoryFile(bytes(SIZE), NodeOptions(read_only=True))

    seen: set[tuple[str, bool]] = set()
    cuts = 0
    for cut in power_cuts(
        workload,
        initial=with_bitmap(**created),
        guest_content=bytes(SIZE),
        seed=number,
        subsets=1,
    ):
        cuts += 1
        content = cut.content
        if created.get("lazy_refcounts"):
            # Opening it for writing rebuilds the counts.
            file = MemoryFile(content)
            open_image(file, backing=below(), node_options=WRITABLE).close()
            content = bytes(file.content)
        assert verify(content).errors == [], str(cut)
        disk = open_image(read_only(content), backing=below())
        assert disk.context.warnings == []  # type: ignore[attr-defined]
        found = disk.read(0, SIZE)
        cut.verify(found)
        for bitmap in disk.dirty_bitmaps:
            seen.add((bitmap.name, bitmap.inconsistent))
            if bitmap.inconsistent:
                continue
            marked = dirty(disk, bitmap.name)
            if bitmap.name == "sum":
                assert marked in merged, str(cut)
            else:
                missing = changed(found, since[bitmap.name]) - marked
                assert not missing, f"{bitmap.name} misses {missing}, {cut}"
    assert cuts > 100
    assert seen == {(name, state) for name in ("first", "second", "sum") for state in (True, False)}


def test_marks_that_come_too_late_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof can fail: without the marks before the first write bitmaps miss something."""
    monkeypatch.setattr(
        "lamina.formats.qcow2.bitmaps.Bitmaps.before_first_write", lambda self: None
    )
    with pytest.raises(AssertionError, match="first misses"):
        test_power_cuts(0)


@pytest.mark.parametrize("size", [3 * SIZE, SIZE // 2])
def test_resizing(size: int) -> None:
    """Bitmaps follow, or are in use."""

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, node_options=WRITABLE)
        guest.write(disk, 0, b"x" * 3000)
        DRIVER.store_bitmaps(disk)
        disk.truncate(size)
        disk.close()

    seen = set()
    initial = with_bitmap(cluster_size=512)
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(SIZE), subsets=2):
        assert verify(cut.content).errors == []
        disk = open_image(read_only(cut.content))
        (bitmap,) = disk.dirty_bitmaps
        seen.add((disk.size, bitmap.inconsistent))
        if not bitmap.inconsistent and any(disk.read(0, 3000)):
            assert list(bitmap.ranges()) == [(0, 3072)]
    assert seen == {(SIZE, True), (SIZE, False), (size, True), (size, False)}
