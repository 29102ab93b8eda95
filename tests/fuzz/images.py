"""Fuzzing whole qcow2 images: opened, read, listed, checked, repaired, read again."""

from __future__ import annotations

import random
from collections.abc import Callable

from lamina.block.driver import Fix
from lamina.block.info import SnapshotInfo
from lamina.block.node import NodeOptions
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.layout import OFFSET_MASK, Header
from lamina.testing.memory import MemoryFile
from tests.fuzz.mutation import mutate
from tests.unit.qcow2.images import make, open_image

UNIT = 512
SIZE = 100 * UNIT
ALL = Fix(leaks=True, errors=True)
LONGEST = 1 << 24
"""Bytes: nothing that is done to a tiny image makes it grow beyond."""


def _seed(*, snapshot: bool = False, **options: object) -> tuple[bytes, list[tuple[int, int]]]:
    """A tiny image with every kind of cluster, and where its tables are."""
    file = MemoryFile(make(SIZE, cluster_size=UNIT, **options))
    disk = open_image(file, node_options=NodeOptions(read_only=False, filename="memory"))
    disk.write(3, b"guest" * 500)
    disk.write_compressed([(20 * UNIT, memoryview(b"packed12" * (UNIT // 8)))])
    disk.write_compressed([(21 * UNIT, memoryview(b"c" * UNIT))])
    disk.write(90 * UNIT, b"y" * 2 * UNIT)
    if options.get("compat") != "0.10":
        disk.write_zeroes(90 * UNIT, UNIT)
        disk.write_zeroes(50 * UNIT, UNIT)
    if snapshot:
        DRIVER.create_snapshot(disk, SnapshotInfo("", "one", 0, 0, 0, 0, 0))
        disk.write(UNIT, b"later" * 300)
    disk.close()
    content = bytes(file.content)
    header = Header.parse(content)
    spans = [(0, 112), (header.refcount_table_offset, header.refcount_table_offset + 16)]
    spans.append((header.l1_table_offset, header.l1_table_offset + header.l1_size * 8))
    for index in range(header.l1_size):
        at = header.l1_table_offset + index * 8
        table = int.from_bytes(content[at : at + 8], "big") & OFFSET_MASK
        if table:
            spans += [(table, table + UNIT)] * 2
    block = header.refcount_table_offset
    block = int.from_bytes(content[block : block + 8], "big")
    spans.append((block, block + 64))
    if snapshot:
        spans.append((header.snapshots_offset, header.snapshots_offset + 80))
    # Compressed data is among the rest.
    spans.append((0, len(content)))
    return content, spans


def fuzz_images(count: int, seed: int = 0) -> dict[str, int]:
    """Put ``count`` mutated images through everything; how many came how far.

    Raises whatever is not one of our errors.
    """
    rng = random.Random(seed)
    seeds = [_seed(), _seed(compat="0.10"), _seed(refcount_bits=1), _seed(refcount_bits=64)]
    seeds.append(_seed(snapshot=True))
    reached = {"opened": 0, "read": 0, "checked": 0, "repaired": 0, "clean": 0}
    for number in range(count):
        content, spans = seeds[number % len(seeds)]
        image = bytes(mutate(rng, content, spans))
        _read(image, reached)
        _check_and_repair(image, reached, rng)
    return reached


def _read(image: bytes, reached: dict[str, int]) -> None:
    file = MemoryFile(image, NodeOptions(read_only=True, filename="memory"))
    try:
        disk = open_image(file)
    except LaminaError:
        return
    reached["opened"] += 1
    size = min(disk.size, 1 << 20)
    failed = False
    for action in (
        lambda: disk.extents(0, size),
        lambda: list(disk.columns(0, size)),
        lambda: disk.read(0, min(size, SIZE)),
        lambda: disk.read(20 * UNIT, 2 * UNIT),
        disk.info,
    ):
        failed |= not _tolerates(action)
    reached["read"] += not failed
    _tolerates(disk.close)
    assert file.content == image


def _tolerates(action: Callable[[], object]) -> bool:
    try:
        action()
    except LaminaError:
        return False
    return True


def _check_and_repair(image: bytes, reached: dict[str, int], rng: random.Random) -> None:
    file = MemoryFile(image)
    writable = NodeOptions(read_only=False, filename="memory")
    try:
        disk = open_image(file, node_options=writable, check=True)
    except LaminaError:
        return
    lines: list[str] = []
    try:
        DRIVER.check(disk, Fix(), lines.append)
        assert file.content == image
        reached["checked"] += 1
        DRIVER.check(disk, ALL, lines.append)
        reached["repaired"] += 1
        again = DRIVER.check(disk, ALL, lines.append)
        assert len(file.content) < LONGEST
        if again.corruptions or again.check_errors:
            return
        reached["clean"] += 1
        # It is sound now: it reads, takes writes, and stays sound.
        size = min(disk.size, SIZE)
        if size >= 4 * UNIT:
            disk.write(rng.randrange(size - 3 * UNIT), b"after" * 200)
            disk.flush()
        disk.close()
        disk = open_image(MemoryFile(file.content), node_options=writable, check=True)
        lines.clear()
        DRIVER.check(disk, Fix(), lines.append)
        assert all(_harmless(line) for line in lines), lines
    except LaminaError:
        return
    finally:
        _tolerates(disk.close)


def _harmless(line: str) -> bool:
    """Where damage had two entries share a place, one of them was given a place of its own, and
    the other one does not know yet that it is alone now."""
    return "OFLAG_COPIED" in line and line.endswith(" refcount=1")
