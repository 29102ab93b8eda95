"""What ``check`` finds, and what it repairs."""

from __future__ import annotations

import struct

import pytest

from lamina.block.driver import Fix
from lamina.formats.vhdx import DRIVER
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB
from tests.unit.vhdx.images import READ_ONLY, filled, logged, make, open_image

SIZE = 5 * MIB
IMAGE = filled(make(SIZE), b"data" * MIB)
BAT = 2 * MIB
ALL = Fix(leaks=True, errors=True)


def run(file: MemoryFile, fix: Fix = ALL, **options) -> tuple[tuple[int, int], list[str]]:
    """(errors left, errors repaired), and what was said."""
    lines: list[str] = []
    with open_image(file, check=True, **options) as disk:
        result = DRIVER.check(disk, fix, lines.append)
    assert (result.leaks, result.check_errors) == (0, 0)
    return (result.corruptions, result.corruptions_fixed), lines


def entry(number: int, value: int) -> MemoryFile:
    file = MemoryFile(IMAGE)
    file.write(BAT + 8 * number, struct.pack("<Q", value))
    return file


def test_nothing_is_wrong():
    for image in (IMAGE, make(SIZE), make(SIZE, subformat="fixed"), make(0)):
        file = MemoryFile(image)
        assert run(file) == ((0, 0), [])
        assert file.content == image, "a check that finds nothing changes nothing"


DAMAGE = [
    (lambda: entry(2, 4), "has the state 4"),
    (lambda: entry(2, 4 * MIB | 7), "has the state 7"),
    (lambda: entry(4, 1 << 40 | 6), "behind the end of the file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_entries_are_repaired(damage, message):
    file = damage()
    before = bytes(file.content)
    found, lines = run(file, Fix(), node_options=READ_ONLY)
    assert found == (1, 0)
    assert message in lines[0]
    assert run(file, Fix(leaks=True))[0] == (1, 0)
    assert file.content == before
    assert run(file)[0] == (0, 1)
    assert run(file) == ((0, 0), [])
    with open_image(file) as disk:
        assert disk.read(0, 2 * MIB) == b"data" * (MIB // 2)


def test_places_used_twice_are_reported():
    first = struct.unpack_from("<Q", IMAGE, BAT)[0]
    for number, value in ((1, first), (4, 2 * MIB | 6), (4, 6)):
        found, lines = run(entry(number, value))
        assert found == (1, 0)
        assert "is used twice" in lines[0]


@pytest.mark.parametrize("place", [64 * KIB + 100, 128 * KIB, 192 * KIB, 256 * KIB + 20])
def test_second_copies_are_repaired(place):
    file = MemoryFile(IMAGE)
    file.content[place] ^= 1
    before = bytes(file.content)
    found, lines = run(file, Fix(), node_options=READ_ONLY)
    assert (found, len(lines)) == ((1, 0), 1)
    assert file.content == before
    found, lines = run(file)
    assert (found, len(lines)) == ((0, 1), 1)
    assert run(file) == ((0, 0), [])


def test_a_log_is_an_error_until_it_is_carried_out():
    file = MemoryFile(logged(make(4 << 30), [(0, 1, 0)]))
    found, lines = run(file, Fix(), node_options=READ_ONLY)
    assert found == (1, 0)
    assert lines == ["ERROR the log holds changes that have not been carried out"]
    assert run(file) == ((0, 1), [])
    assert run(file) == ((0, 0), [])


def test_a_file_without_the_end_of_its_last_block():
    file = MemoryFile(IMAGE[:-4096])
    assert run(file, Fix(), node_options=READ_ONLY)[0] == (1, 0)
    assert run(file)[0] == (0, 1)
    assert file.size == len(IMAGE)
    assert run(file) == ((0, 0), [])


def test_differencing_images():
    parent = filled(make(SIZE), b"p" * 3 * MIB)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(100, b"x" * 3000)
        disk.write(MIB, b"y" * MIB)
    assert run(file, parent=parent) == ((0, 0), [])
    with open_image(file, parent=parent) as disk:
        disk.mapping.before_first_write()
        disk.mapping.bat.set_bitmap(0, 5)
    found, lines = run(file, Fix(), parent=parent)
    assert found == (2, 0)
    assert "partially present without a bitmap" in lines[0]
    assert "has the state 5" in lines[1]
    assert run(file, parent=parent)[0] == (0, 2)
    assert run(file, parent=parent) == ((0, 0), [])
    with open_image(file, parent=parent) as disk:
        assert disk.read(MIB, MIB) == b"y" * MIB
