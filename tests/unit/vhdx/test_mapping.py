"""Where blocks go, what becomes of their space, and how images grow and shrink."""

from __future__ import annotations

import random

import pytest

from lamina.block.driver import Fix
from lamina.block.extents import Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.errors import StorageError, UsageError
from lamina.formats.vhdx import DRIVER
from lamina.formats.vhdx.bitmaps import Bitmaps
from lamina.formats.vhdx.layout import FULLY_PRESENT, PARTIALLY_PRESENT, STATE
from lamina.testing.memory import MemoryFile
from lamina.units import GIB, MIB
from tests.unit.vhdx.images import CreateHere, filled, make, open_image

SIZE = 8 * MIB
START = 8 * MIB
"""Of the file: headers, log, BAT, metadata and a gap of 4 MiB."""


def kinds(disk) -> list[tuple[str, int, int]]:
    return [(one.kind.name, one.length, one.host_offset) for one in disk.extents(0, disk.size)]


def whole(disk) -> None:
    lines: list[str] = []
    assert DRIVER.check(disk, Fix(), lines.append).corruptions == 0, lines


def test_small_writes_move_nothing_else():
    """What they leave out of a new block reads as zeroes already: it is not written."""
    file = MemoryFile(make(SIZE, block_size=4 * MIB))
    written = []
    file.hook = lambda kind, offset, length: written.append((kind, offset, length))
    with open_image(file) as disk:
        written.clear()
        disk.write(MIB + 5, b"x" * 100)
        data = [(offset, length) for kind, offset, length in written if kind == "write"]
    assert data[-1] == (START - 4 * MIB + MIB + 5, 100)
    assert sum(length for _, length in data[:-1]) <= 2 * 4096, "but for the headers"


def test_gaps_are_filled_before_the_file_grows():
    file = MemoryFile(make(SIZE))
    with open_image(file) as disk:
        disk.write(0, b"a" * 4 * MIB)
        assert file.size == START
        disk.write(4 * MIB, b"b" * MIB)
        assert file.size == START + MIB
        disk.discard(MIB, 2 * MIB)
        disk.flush()
        disk.write(6 * MIB + 5, b"c" * 10)
        assert file.size == START + MIB
        disk.write(MIB, b"d" * 10)
        assert disk.read(MIB, 2 * MIB) == b"d" * 10 + bytes(2 * MIB - 10), "nothing of the old"
        whole(disk)
    # Later users find the gaps as well.
    with open_image(file) as disk:
        disk.discard(0, MIB)
    with open_image(file) as disk:
        disk.write(7 * MIB, b"e")
        assert file.size == START + MIB
        assert disk.read(7 * MIB, MIB) == b"e" + bytes(MIB - 1)
        whole(disk)


def test_space_in_use_by_a_reader_is_not_given_away():
    file = MemoryFile(filled(make(SIZE), b"a" * MIB))
    with open_image(file) as disk:
        place = disk.extents(0, MIB)[0].host_offset
        token = disk.pins.enter()
        disk.discard(0, MIB)
        disk.flush()
        disk.write(MIB, b"b" * MIB)
        assert disk.extents(MIB, MIB)[0].host_offset != place
        assert file.content[place] == ord("a")
        disk.pins.leave(token)
        disk.flush()
        disk.write(2 * MIB, b"c" * MIB)
        assert disk.extents(2 * MIB, MIB)[0].host_offset == place


def test_failed_writes_give_their_space_back():
    file = MemoryFile(make(SIZE))
    with open_image(file) as disk:
        disk.write(0, b"a" * 4 * MIB)

        def hook(kind: str, offset: int, length: int) -> None:
            if kind == "write" and offset >= START:
                raise StorageError.from_errno(5)

        file.hook = hook
        for _ in range(5):
            with pytest.raises(StorageError):
                disk.write(5 * MIB, b"b" * 1000)
        file.hook = None
        assert file.size == START + MIB
        disk.write(6 * MIB, b"c")
        assert file.size == START + MIB
        assert disk.read(4 * MIB, 4 * MIB) == bytes(2 * MIB) + b"c" + bytes(2 * MIB - 1)
        whole(disk)


def test_no_space_in_the_file():
    file = MemoryFile(make(SIZE))

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "truncate":
            raise StorageError.from_errno(28)

    with open_image(file) as disk:
        disk.write(0, b"a" * 4 * MIB)
        file.hook = hook
        with pytest.raises(StorageError):
            disk.write(5 * MIB, b"b")
        disk.write(100, b"c")
        file.hook = None
        assert disk.read(5 * MIB, MIB) == bytes(MIB)
        whole(disk)


def test_fixed_images_stay_where_they_are():
    image = make(SIZE, subformat="fixed")
    file = MemoryFile(image)
    with open_image(file) as disk:
        assert kinds(disk) == [("DATA", SIZE, START)]
        disk.write(3 * MIB, b"x" * 5000)
        disk.discard(2 * MIB, 2 * MIB)
        disk.write_zeroes(0, 4 * MIB, WriteFlags.MAY_UNMAP)
        assert kinds(disk) == [("DATA", SIZE, START)]
        assert disk.read(0, SIZE) == bytes(SIZE)
    assert file.size == len(image)


# -- differencing ----------------------------------------------------------------------------------


def test_sectors_of_a_block():
    parent = filled(make(SIZE), b"p" * SIZE)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        reads = []
        below = disk.backing.file
        below.hook = lambda kind, offset, length: reads.append((kind, length))
        disk.write(1000, b"x" * 100)
        assert [length for kind, length in reads if kind == "read" and length < 4096] == [488, 436]
        assert [(kind, length) for kind, length, _ in kinds(disk)] == [
            ("BELOW", 512),
            ("DATA", 1024),
            ("BELOW", SIZE - 1536),
        ]
        assert disk.read(0, 2048) == b"p" * 1000 + b"x" * 100 + b"p" * 948
        # A whole block needs no bitmap.
        disk.write(MIB, b"y" * MIB)
        disk.write_zeroes(2 * MIB, MIB)
        disk.write(2 * MIB + 7, b"z")
        states = [disk.mapping.bat.get(block) & STATE for block in range(4)]
        assert states == [PARTIALLY_PRESENT, FULLY_PRESENT, FULLY_PRESENT, 0]
        assert disk.read(2 * MIB, MIB) == bytes(7) + b"z" + bytes(MIB - 8)
        assert disk.read(3 * MIB, 100) == b"p" * 100
        whole(disk)


def test_stale_bits_do_not_count():
    parent = filled(make(SIZE), b"p" * SIZE)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(1000, b"x" * 5000)
        DRIVER.make_empty(disk)
        assert kinds(disk) == [("BELOW", SIZE, -1)]
        disk.write(MIB // 2, b"y" * 10)
        assert disk.read(0, 10_000) == b"p" * 10_000
        whole(disk)


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_bits(seed):
    rng = random.Random(seed)
    parent = filled(make(SIZE), b"p")
    with open_image(MemoryFile(make(SIZE, parent=parent)), parent=parent) as disk:
        disk.write(0, b"x")
        bitmaps: Bitmaps = disk.mapping.bitmaps
        place = bitmaps.host_offset(0)
        model = bytearray(1 << 20)
        model[0] = 1
        for _ in range(200):
            start = rng.randrange(len(model))
            length = min(rng.choice([1, 7, 8, 500, 5000, 600_000]), len(model) - start)
            value = rng.random() < 0.5
            bitmaps.fill(place, start, length, value)
            model[start : start + length] = bytes([value]) * length
            start = rng.randrange(len(model))
            length = min(rng.randrange(1, 3000), len(model) - start)
            found = bytearray()
            last = None
            for at, count, present in bitmaps.runs(place, start, length):
                assert at == start + len(found)
                assert present != last
                last = present
                found += bytes([present]) * count
            assert found == model[start : start + length]


def test_images_that_cannot_be_made():
    parent = open_image(MemoryFile(make(SIZE)))
    raw = MemoryFile(bytes(SIZE))
    backed = {"backing_file": "below", "backing_fmt": "vhdx"}
    for options, below, message in (
        (backed, raw, "must be one as well"),
        ({**backed, "backing_fmt": "raw"}, parent, "must be one as well"),
        ({**backed, "subformat": "fixed"}, parent, "fixed image has no backing file"),
        ({**backed, "logical_sector_size": 4096}, parent, "as large as those of its parent"),
        ({"logical_sector_size": 1024}, None, "must be 512 or 4096"),
        ({"block_size": 3 * MIB}, None, "power of two"),
        ({"log_size": 4 * GIB}, None, "smaller than 4 GB"),
        ({"size": 65 << 40}, None, "max of 64TB"),
    ):
        given = DRIVER.CreateOptions(**{"size": SIZE, **options})
        with pytest.raises(UsageError, match=message):
            DRIVER.create(given, MemoryFile(), CreateHere(below))
    parent.close()


# -- length ----------------------------------------------------------------------------------------


def test_growing_and_shrinking():
    file = MemoryFile(make(SIZE))
    with open_image(file) as disk:
        disk.write(0, b"a" * SIZE)
        disk.truncate(3 * MIB + 512)
        assert kinds(disk) == [("DATA", 3 * MIB + 512, 4 * MIB)]
        assert file.size == START
        disk.truncate(10 * MIB)
        assert disk.read(0, 10 * MIB) == b"a" * (3 * MIB + 512) + bytes(7 * MIB - 512)
        whole(disk)
    with open_image(file) as disk:
        assert disk.size == 10 * MIB
        for size, message in ((1000, "multiple of 512"), (65 << 40, "max of 64TB")):
            with pytest.raises(UsageError, match=message):
                disk.truncate(size)
        with pytest.raises(UsageError, match="shrinking"):
            disk.truncate(MIB, Preallocation.FULL)


def test_what_somebody_left_behind_the_end_does_not_show():
    """In the last block, and in entries of the BAT that are not in use."""
    file = MemoryFile(filled(make(SIZE), b"a" * SIZE))
    size = file.content.index(SIZE.to_bytes(8, "little"), 3 * MIB + 65536)
    file.content[size : size + 8] = (2 * MIB + 512).to_bytes(8, "little")
    with open_image(file) as disk:
        disk.truncate(SIZE)
        assert disk.read(0, SIZE) == (b"a" * (2 * MIB + 512)).ljust(SIZE, b"\0")
        whole(disk)


def test_growing_above_a_parent_shows_nothing_of_it():
    parent = filled(make(SIZE), b"p" * SIZE)
    file = MemoryFile(make(2 * MIB + 1024, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(MIB, b"x")
        disk.truncate(SIZE)
        expected = b"p" * MIB + b"x" + b"p" * (MIB + 1023)
        assert disk.read(0, SIZE) == expected.ljust(SIZE, b"\0")
        whole(disk)


def test_bitmaps_go_with_what_they_describe():
    """A bitmap block describes 4 GiB: the second one is given back, and does not come back."""
    size = 5 * GIB
    parent = filled(make(size), b"p" * MIB)
    file = MemoryFile(make(size, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(4 * GIB + 100, b"x")
        disk.write(100, b"y")
        places = [disk.mapping.bitmaps.host_offset(chunk) for chunk in range(2)]
        assert all(places)
        disk.truncate(2 * GIB)
        disk.flush()
        assert disk.mapping.bitmaps.host_offset(0) == places[0]
        disk.write(MIB, b"z" * 4 * MIB)
        disk.truncate(size)
        assert disk.mapping.bitmaps.host_offset(1) == 0
        disk.write(4 * GIB + MIB + 7, b"x")
        assert disk.read(0, 200) == b"p" * 100 + b"y" + b"p" * 99
        assert disk.read(4 * GIB, 2 * MIB) == bytes(MIB + 7) + b"x" + bytes(MIB - 8)
        whole(disk)
    with open_image(file, parent=parent) as disk:
        assert disk.read(MIB, 4 * MIB) == b"z" * 4 * MIB
        whole(disk)


@pytest.mark.parametrize("mode", list(Preallocation))
def test_growing_fixed_and_preallocated(mode):
    for subformat in ("dynamic", "fixed"):
        file = MemoryFile(make(SIZE, subformat=subformat))
        with open_image(file) as disk:
            disk.truncate(2 * SIZE, mode)
            allocated = subformat == "fixed" or mode is not Preallocation.OFF
            expected = Kind.DATA if allocated else Kind.ZERO
            assert {one.kind for one in disk.extents(SIZE, SIZE)} == {expected}
            assert disk.read(SIZE, SIZE) == bytes(SIZE)
            whole(disk)


def test_the_table_moves_when_it_has_to_grow():
    file = MemoryFile(filled(make(SIZE), b"a" * SIZE))
    with open_image(file) as disk:
        disk.truncate(200 * GIB)
        assert disk.mapping.bat.offset != 2 * MIB
        # Its old place is free now.
        disk.write(150 * GIB, b"far")
        assert disk.extents(150 * GIB, MIB)[0].host_offset == 2 * MIB
        whole(disk)
    with open_image(file) as disk:
        assert disk.read(0, SIZE) == b"a" * SIZE
        assert disk.read(150 * GIB, 3) == b"far"
        assert disk.mapping.image.good_tables == (True, True)
        disk.truncate(SIZE)
        assert disk.read(0, SIZE) == b"a" * SIZE
        whole(disk)
