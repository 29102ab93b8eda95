"""Extents as columns are what ``resolve`` says, whatever the image."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.block.extents import Kind
from lamina.block.node import Node
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, read_only
from tests.unit.qcow2_check.damage import UNIT, WRITABLE, Image, sound

Row = tuple[int, int, Kind, int, int, Node | None]


def joined(rows: list[Row]) -> list[Row]:
    result: list[Row] = []
    for row in rows:
        if result and row[2] != Kind.ENCODED and row[2] == result[-1][2]:
            start, length, kind, host, stored, node = result[-1]
            if row[3] == (host + length if host >= 0 else -1) and node is row[5]:
                result[-1] = (start, length + row[1], kind, host, stored, node)
                continue
        result.append(row)
    return result


def by_columns(disk: Disk, offset: int, length: int) -> list[Row]:
    rows: list[Row] = []
    for piece in disk.columns(offset, length):
        found = [
            (start, size, Kind(kind), host, stored, piece.nodes[node])
            for start, size, kind, host, stored, node in zip(
                *(column.tolist() for column in piece[:6]), strict=True
            )
        ]
        assert found == joined(found)
        rows += found
    return joined(rows)


def by_resolving(disk: Disk, offset: int, length: int) -> list[Row]:
    return joined(
        [
            (e.guest_offset, e.length, e.kind, e.host_offset, e.stored_length, e.node)
            for e in disk.extents(offset, length)
        ]
    )


def scribble(disk: Disk, rng: random.Random, unit: int, operations: int) -> None:
    size = disk.size
    for _ in range(operations):
        offset = rng.randrange(size - 1)
        length = min(rng.choice([1, unit, 5 * unit, 40 * unit]), size - offset)
        start = offset // unit * unit
        action = rng.randrange(6)
        if action < 3:
            disk.write(offset, b"w" * length)
        elif action == 3 and start + unit <= size:
            disk.write_compressed([(start, memoryview(b"c" * unit))])
        elif action == 4:
            disk.write_zeroes(offset, length)
        else:
            disk.discard(start, min(3 * unit, size - start))


@pytest.mark.parametrize("seed", range(12))
def test_same_as_resolving(seed: int) -> None:
    rng = random.Random(seed)
    unit = rng.choice([512, 1024, 65536])
    options: dict[str, Any] = {"cluster_size": unit}
    if seed % 4 == 3:
        options["compat"] = "0.10"
    size = rng.choice([300 * 512, 1 << 20, (5 << 20) + 512])
    file = MemoryFile(make(size, **options))
    disk = open_image(file, node_options=WRITABLE)
    for _ in range(3):
        # Tables that were not written yet count as well.
        scribble(disk, rng, unit, 12)
        assert by_columns(disk, 0, size) == by_resolving(disk, 0, size)
        for _ in range(10):
            offset = rng.randrange(size)
            length = rng.randrange(1, size - offset + 1)
            assert by_columns(disk, offset, length) == by_resolving(disk, offset, length)
    disk.close()
    again = open_image(MemoryFile(file.content))
    assert by_columns(again, 0, size) == by_resolving(again, 0, size)


def test_full_tables_are_one_row() -> None:
    size = 64 << 20
    file = MemoryFile(make(size, cluster_size=UNIT, preallocation="metadata"))
    disk = open_image(file)
    pieces = list(disk.columns(UNIT, size - 3 * UNIT))
    rows = sum(len(piece.kind) for piece in pieces)
    assert rows == len(by_resolving(disk, UNIT, size - 3 * UNIT))
    assert by_columns(disk, UNIT, 100) == by_resolving(disk, UNIT, 100)


def test_nothing_and_nowhere() -> None:
    disk = open_image(MemoryFile(make(1 << 30)))
    assert list(disk.columns(0, 0)) == []
    assert by_columns(disk, 5, 1 << 29) == [(5, 1 << 29, Kind.BELOW, -1, 0, None)]


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}])
def test_broken_entries_are_refused_as_in_reading(options: dict[str, Any]) -> None:
    changes = [
        lambda image: image.change(image.entry(0), set=0x200),
        lambda image: image.change(image.l1, set=0x200),
    ]
    if options:
        changes.append(lambda image: image.change(image.entry(0), set=1))
    for change in changes:
        image = Image(sound(**options))
        change(image)
        disk = open_image(read_only(bytes(image.content)))
        with pytest.raises(ImageCorrupt):
            disk.extents(0, disk.size)
        with pytest.raises(ImageCorrupt):
            list(disk.columns(0, disk.size))
