"""Reference counts as arrays: widths, windows, clusters with very many references."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lamina.formats.qcow2 import census as census_module
from lamina.formats.qcow2 import check as check_module
from lamina.formats.qcow2.arrays import pack_counts, read_tables, read_words, unpack_counts
from lamina.formats.qcow2.census import Census, count_uses
from lamina.formats.qcow2.refblock import Width
from lamina.formats.qcow2.regions import Regions
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import verify
from tests.unit.qcow2_check.damage import (
    ALL,
    DAMAGES,
    NOTHING,
    UNIT,
    Damage,
    Image,
    damaged,
    is_clean,
    run_check,
    sound,
)


@pytest.mark.parametrize("order", range(7))
def test_counts_are_packed_as_one_by_one(order: int) -> None:
    width = Width(order)
    rng = random.Random(order)
    values = [rng.randrange(min(width.maximum, 1 << 62) + 1) for _ in range(width.entries(512))]
    block = bytearray(512)
    for index, value in enumerate(values):
        width.fill(block, index, 1, value)
    counts = unpack_counts(block, order)
    assert counts.tolist() == values
    assert pack_counts(counts, order) == block


def test_tables_are_read_in_runs() -> None:
    content = np.arange(4096, dtype=">u8").tobytes()
    file = MemoryFile(content)
    assert read_words(file, 80, 3).tolist() == [10, 11, 12]
    assert read_words(file, len(content) - 8, 3).tolist() == [4095, 0, 0]
    assert read_words(file, 1 << 60, 2).tolist() == [0, 0]
    offsets = np.array([1024, 1536, 0, 512, 1 << 50])
    rows = [
        (int(offset), row[0], row[-1])
        for run in read_tables(file, offsets, 512)
        for offset, row in zip(run.offsets, run.entries.tolist(), strict=True)
    ]
    assert rows == [
        (1024, 128, 191),
        (1536, 192, 255),
        (0, 0, 0),
        (512, 64, 127),
        (1 << 50, 0, 0),
    ]


def test_a_census_counts_its_window_and_names_the_others() -> None:
    census = Census(100, 50, np.uint16)
    census.add(np.array([99, 100, 149, 149, 150, 101]))
    census.add(np.arange(110, 120))
    census.add_run(140, 30, 2)
    census.add(np.array([census_module.WINDOW + 5]))
    assert census.counts[:2].tolist() == [1, 1]
    assert census.counts[10:20].tolist() == [1] * 10
    assert census.counts[40:].tolist() == [2] * 9 + [4]
    assert census.windows >= {0, 1}
    assert census.get(149) == 4
    assert census.get(0) == 0
    assert census.is_exact()


def test_a_census_knows_when_it_ran_over() -> None:
    census = Census(0, 4, np.uint16)
    census.add_run(2, 1, 65535)
    assert census.is_exact()
    census.add_run(2, 1)
    assert not census.is_exact()


def test_uses_and_regions() -> None:
    first, weights = count_uses(np.array([5, 7, 5, 9, 7, 5]))
    assert first.tolist() == [0, 1, 3]
    assert weights.tolist() == [3, 2, 0, 1, 0, 0]
    regions = Regions()
    assert regions.contain(np.array([1])).tolist() == [False]
    regions.add(10, 20, "ten")
    regions.add(12, 13)
    regions.add(30, 31)
    inside = regions.contain(np.array([9, 10, 12, 19, 20, 30, 31]))
    assert inside.tolist() == [False, True, True, True, False, True, False]
    assert regions.vital(19) == "ten"
    assert regions.vital(30) == ""


DIFFERENT_WHEN_LONGER = (
    "data cut off",
    "no refcount table",
    "refcount table in the header",
    "refcount block twice",
    "refcount block on the L2 table",
    "refcount block on the L1 table",
    "data lies on the refcount block",
    "L2 table is the refcount block",
)
"""What is wrong with these depends on how long the file is: more or fewer of the counts in a block
that holds something else are looked at."""


@pytest.mark.parametrize(
    "damage",
    [one for one in DAMAGES if one.repairable and one.name not in DIFFERENT_WHEN_LONGER],
    ids=lambda damage: damage.name.replace(" ", "-"),
)
def test_windows_make_no_difference(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more clusters than are counted at a time, here two."""
    whole = MemoryFile(damaged(damage))
    expected = run_check(whole, ALL)
    monkeypatch.setattr(census_module, "WINDOW", 2048)
    monkeypatch.setattr(check_module, "WINDOW", 2048)
    content = Image(damaged(damage))
    content.grow(3 * 2048)
    file = MemoryFile(bytes(content.content))
    _, lines = run_check(file, ALL)
    rebuilt = "Rebuilding refcount structure"
    assert (rebuilt in lines) == (rebuilt in expected[1])
    assert sorted(lines) == sorted(expected[1])
    assert is_clean(run_check(file, NOTHING)[0])
    assert verify(bytes(file.content)).errors == []


def test_more_references_than_a_count_can_hold() -> None:
    image = Image(sound(refcount_bits=2))
    for index in range(10, 16):
        image.put(image.entry(index), image.get(image.entry(0)))
    file = MemoryFile(bytes(image.content))
    result, lines = run_check(file, NOTHING)
    offset = image.place(0)
    assert lines.count(f"ERROR: overflow cluster offset={offset:#x}") == 4
    assert f"ERROR cluster {offset // UNIT} refcount=1 reference=3" in lines
    assert result.corruptions == 5


def test_one_table_named_by_very_many_entries() -> None:
    """Counted once for each, read but once."""
    image = Image(sound())
    entries = 1 << 17
    place = image.grow(entries * 8 // UNIT)
    for index in range(entries):
        image.put(place + index * 8, image.get(image.l1))
    image.content[36:40] = entries.to_bytes(4, "big")
    image.put(40, place)
    file = MemoryFile(bytes(image.content))
    result, lines = run_check(file, NOTHING)
    # 65536 references do not fit into 16 bits: not those to the table, nor to six clusters.
    assert result.corruptions > 7 * (entries - 65535)
    assert len([line for line in lines if "overflow" in line]) == 700
    assert result.allocated_clusters == 6 * entries
