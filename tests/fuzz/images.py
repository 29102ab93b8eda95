"""Fuzzing whole qcow2 images: opened, read, listed, checked, repaired, read again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from lamina.block.driver import Fix
from lamina.block.info import SnapshotInfo
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
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


class Seed(NamedTuple):
    content: bytes
    spans: list[tuple[int, int]]
    """Where its tables are."""
    unit: int
    data: bytes | None
    """Of the data file, if it has one."""

    def opened(self, file: MemoryFile, node_options: NodeOptions, *, check: bool = False) -> Disk:
        data = None if self.data is None else MemoryFile(self.data, node_options)
        return open_image(file, data=data, node_options=node_options, check=check)


def _seed(
    *,
    unit: int = UNIT,
    snapshot: bool = False,
    external: bool = False,
    bitmaps: bool = False,
    **options: object,
) -> Seed:
    """A tiny image with every kind of cluster."""
    data = MemoryFile() if external else None
    file = MemoryFile(make(SIZE // UNIT * unit, data=data, cluster_size=unit, **options))
    writable = NodeOptions(read_only=False, filename="memory")
    disk = open_image(file, data=data, node_options=writable)
    if bitmaps:
        for name in ("b0", "another", "third"):
            DRIVER.add_bitmap(disk, name, UNIT)
    disk.write(3, b"guest" * unit)
    if not external:
        disk.write_compressed([(20 * unit, memoryview(b"packed12" * (unit // 8)))])
        disk.write_compressed([(21 * unit, memoryview(b"c" * unit))])
    disk.write(90 * unit, b"y" * 2 * unit)
    if options.get("compat") != "0.10":
        disk.write_zeroes(90 * unit, unit)
        disk.write_zeroes(50 * unit, unit)
        disk.write_zeroes(91 * unit + unit // 4, unit // 2)
    if snapshot:
        DRIVER.create_snapshot(disk, SnapshotInfo("", "one", 0, 0, 0, 0, 0))
        disk.write(unit, b"later" * 300)
    disk.close()
    content = bytes(file.content)
    header = Header.parse(content)
    spans = [(0, 112), (header.refcount_table_offset, header.refcount_table_offset + 16)]
    spans.append((header.l1_table_offset, header.l1_table_offset + header.l1_size * 8))
    for index in range(header.l1_size):
        at = header.l1_table_offset + index * 8
        table = int.from_bytes(content[at : at + 8], "big") & OFFSET_MASK
        if table:
            used = min(unit, 100 * header.l2_entry_size)
            spans += [(table, table + used)] * (2 if unit == UNIT else 5)
    block = header.refcount_table_offset
    block = int.from_bytes(content[block : block + 8], "big")
    spans.append((block, block + 64))
    if snapshot:
        spans.append((header.snapshots_offset, header.snapshots_offset + 80))
    if bitmaps:
        assert header.bitmaps is not None
        start = header.bitmaps.directory_offset
        # The extension, which is the first of this header, the directory and the first table.
        spans += [(112, 144), (88, 96), *[(start, start + header.bitmaps.directory_size)] * 4]
        table = int.from_bytes(content[start : start + 8], "big")
        spans += [(table, table + 8)] * 2
    # Compressed data is among the rest.
    spans.append((0, len(content)))
    return Seed(content, spans, unit, None if data is None else bytes(data.content))


def fuzz_images(count: int, seed: int = 0) -> dict[str, int]:
    """Put ``count`` mutated images through everything; how many came how far.

    Raises whatever is not one of our errors.
    """
    rng = random.Random(seed)
    seeds = [_seed(), _seed(compat="0.10"), _seed(refcount_bits=1), _seed(refcount_bits=64)]
    seeds.append(_seed(snapshot=True))
    seeds.append(_seed(external=True))
    wide = {"unit": 16 << 10, "extended_l2": True}
    seeds += [_seed(**wide), _seed(snapshot=True, **wide), _seed(external=True, **wide)]
    seeds.append(_seed(external=True, data_file_raw=True))
    seeds.append(_seed(bitmaps=True))
    reached = {"opened": 0, "read": 0, "checked": 0, "repaired": 0, "clean": 0}
    for number in range(count):
        one = seeds[number % len(seeds)]
        image = bytes(mutate(rng, one.content, one.spans))
        _read(one, image, reached)
        _check_and_repair(one, image, reached, rng)
    return reached


def _read(seed: Seed, image: bytes, reached: dict[str, int]) -> None:
    file = MemoryFile(image, NodeOptions(read_only=True, filename="memory"))
    unit = seed.unit
    try:
        disk = seed.opened(file, file.options)
    except LaminaError:
        return
    reached["opened"] += 1
    size = min(disk.size, 1 << 20)
    failed = False
    for action in (
        lambda: disk.extents(0, size),
        lambda: list(disk.columns(0, size)),
        lambda: disk.read(0, min(size, 100 * unit)),
        lambda: disk.read(20 * unit, 2 * unit),
        disk.info,
        lambda: [list(bitmap.ranges()) for bitmap in disk.dirty_bitmaps],
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


def _check_and_repair(
    seed: Seed, image: bytes, reached: dict[str, int], rng: random.Random
) -> None:
    file = MemoryFile(image)
    writable = NodeOptions(read_only=False, filename="memory")
    unit = seed.unit
    try:
        disk = seed.opened(file, writable, check=True)
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
        size = min(disk.size, 100 * unit)
        if size >= 4 * unit:
            disk.write(rng.randrange(size - 3 * unit), b"after" * 200)
            disk.write_zeroes(rng.randrange(size - unit), unit)
            disk.flush()
        for bitmap in disk.dirty_bitmaps[1:]:
            _tolerates(lambda name=bitmap.name: DRIVER.clear_bitmap(disk, name))
        for bitmap in disk.dirty_bitmaps[:1]:
            DRIVER.remove_bitmap(disk, bitmap.name)
        disk.close()
        disk = seed.opened(MemoryFile(file.content), writable, check=True)
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
