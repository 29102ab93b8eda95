"""VHD images seen through their file: footers, bitmaps, parents, damage, resizing."""

from __future__ import annotations

import random
import struct

import pytest

from lamina.block.extents import Kind
from lamina.block.limits import Preallocation
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.formats.vpc import DRIVER
from lamina.formats.vpc.layout import FIXED, parse_footer
from lamina.testing.memory import MemoryFile
from tests.unit.vpc.images import (
    ALL,
    BLOCK,
    ID,
    LEAKS,
    TABLE,
    UNIT,
    WRITABLE,
    check,
    fixed,
    footer,
    make,
    open_image,
)

SIZE = 40 * UNIT
DATA = TABLE + 512
"""Where the first block of a small image begins."""


def entries(content: bytes, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{count}I", content, TABLE)


def filled(blocks: list[int], size: int = SIZE) -> MemoryFile:
    """Each of these blocks holds its number, and they are in the file in this order."""
    file = MemoryFile(make(size), WRITABLE)
    disk = open_image(file)
    for block in blocks:
        disk.write(block * UNIT, bytes([block]) * min(UNIT, size - block * UNIT))
    disk.close()
    return file


def sound(file: MemoryFile) -> None:
    result, lines, _ = check(file.content)
    assert (result.corruptions, result.leaks, lines) == (0, 0, [])


# -- dynamic images --------------------------------------------------------------------------------


def test_blocks_are_appended_with_full_bitmaps() -> None:
    file = filled([3, 1])
    assert entries(file.content, 4) == (0xFFFFFFFF, (DATA + BLOCK) // 512, 0xFFFFFFFF, DATA // 512)
    assert file.content[DATA : DATA + 512] == b"\xff" * 512
    assert file.size == DATA + 2 * BLOCK + 512
    assert file.content[-512:] == file.content[:512]
    sound(file)


def test_sectors_that_others_think_unused_are_marked_when_they_are_written() -> None:
    file = filled([0])
    file.content[DATA : DATA + 512] = bytes(512)
    disk = open_image(file)
    disk.write(1024 + 100, b"x" * 1000)
    disk.flush()
    assert file.content[DATA] == 0b00111000
    assert disk.read(0, UNIT) == bytes(1124) + b"x" * 1000 + bytes(UNIT - 2124)
    # Once they are, there is nothing to write but data.
    file.calls.clear()
    disk.write(1024, b"y" * 512)
    assert file.calls == ["write"]


def test_zeroes_and_discards_take_no_space() -> None:
    file = filled([1])
    disk = open_image(file)
    disk.write(UNIT, b"x")
    file.calls.clear()
    disk.write_zeroes(0, SIZE)
    disk.discard(0, SIZE)
    assert file.calls == ["zero", "discard"]
    # Blocks may be large: what is given up is often less.
    disk.discard(UNIT - 100, UNIT + 200)
    assert file.calls == ["zero", "discard", "discard"]
    disk.close()
    sound(file)


def test_a_write_that_fails_leaves_the_footer_at_the_end() -> None:
    file = filled([0])
    disk = open_image(file)

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "write" and length == UNIT:
            raise StorageError.from_errno(5)

    file.hook = fail
    with pytest.raises(StorageError):
        disk.write(3 * UNIT, b"x" * UNIT)
    disk.flush()
    file.hook = None
    disk.close()
    assert file.size == DATA + BLOCK + 512
    sound(file)


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_good_footer_is_enough(which: str) -> None:
    file = filled([0, 1])
    content = file.content
    at = 0 if which == "first" else len(content) - 512
    content[at : at + 512] = b"?" * 512
    # Reading repairs nothing.
    disk = open_image(MemoryFile(content))
    assert disk.read(UNIT, UNIT) == b"\1" * UNIT
    disk.close()
    assert check(content)[0].corruptions == 1
    disk = open_image(file)
    disk.write(UNIT, b"\1")
    disk.close()
    sound(file)


def test_short_footers_are_read() -> None:
    file = filled([0])
    file.content[:512] = bytes(512)
    disk = open_image(MemoryFile(file.content))
    assert disk.read(0, UNIT) == bytes(UNIT)


@pytest.mark.parametrize("place", [0, 512, TABLE])
def test_blocks_in_the_metadata(place: int) -> None:
    file = filled([1])
    struct.pack_into(">I", file.content, TABLE, place // 512)
    disk = open_image(MemoryFile(file.content))
    for ask in (
        lambda: disk.read(0, 1),
        lambda: disk.write(0, b"x"),
        lambda: list(disk.columns(0, SIZE)),
    ):
        with pytest.raises(ImageCorrupt, match="in the metadata of the image"):
            ask()


# -- fixed images ----------------------------------------------------------------------------------


def test_fixed_images_are_their_data() -> None:
    file = MemoryFile(fixed(SIZE), WRITABLE)
    disk = open_image(file)
    assert disk.size == SIZE
    disk.write(SIZE - 100, b"x" * 100)
    disk.write_zeroes(SIZE - 50, 50)
    disk.discard(0, SIZE)
    disk.close()
    assert file.content[SIZE:] == footer(SIZE, FIXED).pack()
    sound(file)


def test_the_guest_of_a_fixed_disk_cannot_make_it_another_one() -> None:
    """A first sector that looks like the footer of a differencing image is the guest's."""
    file = MemoryFile(fixed(SIZE), WRITABLE)
    disk = open_image(file)
    disk.write(0, make(SIZE, parent=b"p" * 16))
    disk.close()
    again = open_image(MemoryFile(file.content))
    assert again.size == SIZE
    assert again.read(0, 8) == b"conectix"


@pytest.mark.parametrize("size", [SIZE + 512, 2 * SIZE, SIZE - 512, 4096])
def test_resizing_fixed_images(size: int) -> None:
    file = MemoryFile(b"x" * SIZE + fixed(SIZE)[-512:], WRITABLE)
    disk = open_image(file)
    disk.truncate(size)
    assert disk.read(0, size) == (b"x" * min(size, SIZE)).ljust(size, b"\0")
    disk.close()
    assert file.size == size + 512
    disk = open_image(MemoryFile(file.content))
    assert disk.size == size


# -- resizing --------------------------------------------------------------------------------------


def test_growing_moves_the_table() -> None:
    file = filled([0, 39])
    disk = open_image(file)
    disk.truncate(1000 * UNIT)
    disk.write(900 * UNIT, b"\x77" * UNIT)
    disk.close()
    sound(file)
    disk = open_image(MemoryFile(file.content))
    assert disk.size == 1000 * UNIT
    assert [disk.read(n * UNIT, 1)[0] for n in (0, 1, 39, 40, 900)] == [0, 0, 39, 0, 0x77]


def test_shrinking_forgets() -> None:
    file = filled([0, 1, 2, 3])
    disk = open_image(file)
    disk.truncate(2 * UNIT + 512)
    disk.truncate(SIZE)
    assert disk.read(2 * UNIT, 2 * UNIT) == b"\2" * 512 + bytes(2 * UNIT - 512)
    disk.close()
    sound(file)


def test_sizes_that_no_geometry_makes_are_kept() -> None:
    image = bytearray(make(SIZE))
    about = parse_footer(image[:512])
    image[28:32] = b"qemu"
    file = MemoryFile(make(SIZE), WRITABLE)
    disk = open_image(file)
    disk.truncate(SIZE + 512)
    disk.close()
    assert about.current_size == SIZE
    assert open_image(MemoryFile(file.content)).size == SIZE + 512


def test_sizes_that_cannot_be() -> None:
    disk = open_image(MemoryFile(make(SIZE)))
    with pytest.raises(StorageError, match="File too large"):
        disk.truncate(2041 << 30)
    with pytest.raises(UsageError):
        disk.truncate(SIZE + 1)
    with pytest.raises(ImageUnsupported):
        disk.truncate(2 * SIZE, Preallocation.FULL)
    assert disk.size == SIZE


# -- differencing images ---------------------------------------------------------------------------


def child(base: bytes | MemoryFile = b"b" * SIZE) -> tuple[MemoryFile, object]:
    file = MemoryFile(make(SIZE, parent=ID), WRITABLE)
    below = base if isinstance(base, MemoryFile) else MemoryFile(base)
    return file, open_image(file, below)


def test_groups_of_sectors_are_copied_not_blocks() -> None:
    unit = 4 * UNIT
    file = MemoryFile(make(SIZE, unit=unit, parent=ID), WRITABLE)
    disk = open_image(file, MemoryFile(b"b" * SIZE))
    disk.write(unit + 4096 + 700, b"mine")
    disk.flush()
    assert [(one.guest_offset, one.length) for one in disk.extents(0, SIZE)] == [
        (0, unit + 4096),
        (unit + 4096, 4096),
        (unit + 8192, SIZE - unit - 8192),
    ]
    expected = bytearray((b"b" * (4096 + 700) + b"mine").ljust(unit, b"b"))
    assert disk.read(unit, unit) == expected
    disk.write(unit + 8100, b"across groups" * 400)
    expected[8100 : 8100 + 5200] = b"across groups" * 400
    assert disk.read(unit, unit) == expected
    disk.close()
    sound(file)


def test_sectors_that_others_wrote_one_by_one() -> None:
    file, disk = child()
    disk.write(0, b"x" * UNIT)
    disk.close()
    at = TABLE + 1024
    assert file.content[at] == 0xFF
    # Of the first block, only the third and the last sector are ours.
    file.content[at] = 0b00100001
    disk = open_image(file, MemoryFile(b"b" * SIZE))
    expected = bytearray(b"b" * 1024 + b"x" * 512 + b"b" * 2048 + b"x" * 512)
    assert disk.read(0, UNIT) == expected
    disk.write(3000, b"y" * 10)
    expected[3000:3010] = b"y" * 10
    assert disk.read(0, UNIT) == expected
    disk.write(100, b"y" * 1000)
    expected[100:1100] = b"y" * 1000
    assert disk.read(0, UNIT) == expected
    disk.close()


def test_zeroes_cover_the_parent() -> None:
    file, disk = child()
    disk.write_zeroes(100, 3 * UNIT)
    assert disk.read(0, 4 * UNIT) == b"b" * 100 + bytes(3 * UNIT) + b"b" * (UNIT - 100)
    disk.close()
    sound(file)


def test_growing_above_a_longer_parent() -> None:
    _, disk = child(b"b" * 2 * SIZE)
    disk.truncate(2 * SIZE, zeroed=True)
    assert disk.read(SIZE - 10, 100) == b"b" * 10 + bytes(90)


def test_only_the_parent_will_do() -> None:
    file = MemoryFile(make(SIZE, parent=b"somebody else..."), WRITABLE)
    with pytest.raises(ImageCorrupt, match="its unique id differs"):
        open_image(file, open_image(filled([0])))
    open_image(MemoryFile(make(SIZE, parent=ID)), open_image(filled([0])))


def test_another_parent() -> None:
    """Only the locators, and what the header says of the parent, are new."""
    file = MemoryFile(make(SIZE, parent=ID), WRITABLE)
    other = MemoryFile(make(SIZE, identity=b"another identity"))
    disk = open_image(file, MemoryFile(b"b" * SIZE), parent=other)
    disk.write(0, b"x" * 4096)
    for name in ("other.vhd", "../up/other.vhd", "/disks/other.vhd"):
        DRIVER.change_backing_file(disk, name, "vpc")
        assert disk.info().backing_filename == name
        sound(file)
        assert parse_footer(file.content[:512]).data_offset == 512
        assert disk.read(0, 4097) == b"x" * 4096 + b"b"
    before = bytes(file.content)
    with pytest.raises(ImageUnsupported, match="must be one as well"):
        DRIVER.change_backing_file(disk, "other.raw", "raw")
    with pytest.raises(UsageError, match="must be a local file"):
        DRIVER.change_backing_file(disk, "nbd://host/other", "vpc")
    with pytest.raises(UsageError, match="too long"):
        DRIVER.change_backing_file(disk, "x" * 3000, "vpc")
    other.content[:] = bytes(SIZE)
    with pytest.raises(ImageUnsupported, match="must be one as well"):
        DRIVER.change_backing_file(disk, "other.vhd", "vpc")
    disk.close()
    assert file.content == before
    plain = open_image(filled([0]))
    with pytest.raises(ImageUnsupported, match="cannot gain one"):
        DRIVER.change_backing_file(plain, "other.vhd", "vpc")


def test_emptying() -> None:
    file, disk = child()
    empty = bytes(file.content)
    disk.write(0, b"x" * SIZE)
    DRIVER.make_empty(disk)
    assert disk.read(0, SIZE) == b"b" * SIZE
    disk.write(512, b"y" * 512)
    assert disk.read(0, UNIT) == b"b" * 512 + b"y" * 512 + b"b" * (UNIT - 1024)
    DRIVER.make_empty(disk)
    disk.close()
    assert file.content == empty


@pytest.mark.parametrize(
    ("code", "stored", "name"),
    [
        (b"W2ru", ".\\below.vhd", "below.vhd"),
        (b"W2ru", "..\\up\\below.vhd", "../up/below.vhd"),
        (b"W2ru", "json:{}", "./json:{}"),
        (b"W2ru", "nbd:host:1", "./nbd:host:1"),
        (b"W2ku", "D:\\disks\\below.vhd", "below.vhd"),
        (b"W2ku", "/disks/below.vhd", "/disks/below.vhd"),
        (b"MacX", "file:///disks/be%20low.vhd", "/disks/be low.vhd"),
        (b"Wi2k", "what nobody knows", "p"),
    ],
)
def test_names_of_parents(code: bytes, stored: str, name: str) -> None:
    image = bytearray(make(SIZE, parent=ID))
    data = stored.encode("utf-8" if code == b"MacX" else "utf-16-le")
    image[512 + 576 : 512 + 580] = code
    struct.pack_into(">I", image, 512 + 584, len(data))
    image[TABLE : TABLE + 512] = data.ljust(512, b"\0")
    about = open_image(MemoryFile(image), MemoryFile()).info()
    assert (about.backing_filename, about.backing_format) == (name, "vpc")


# -- damage ----------------------------------------------------------------------------------------


def test_overlapping_blocks_are_parted() -> None:
    file = filled([0, 1, 2])
    struct.pack_into(">I", file.content, TABLE + 4, DATA // 512 + 1)
    struct.pack_into(">I", file.content, TABLE + 12, 2)
    result, lines, same = check(file.content)
    assert same == file.content
    assert (result.corruptions, len(lines)) == (2, 2)
    result, _, repaired = check(file.content, ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 2)
    sound(MemoryFile(repaired))
    disk = open_image(MemoryFile(repaired))
    assert disk.read(2 * UNIT, UNIT) == b"\2" * UNIT
    assert disk.read(3 * UNIT, UNIT) == bytes(UNIT)


def test_leaks_at_the_end_are_cut_off() -> None:
    file = filled([0, 1])
    before = bytes(file.content)
    struct.pack_into(">I", file.content, TABLE + 4, 0xFFFFFFFF)
    assert check(file.content)[0].leaks == 1
    result, _, repaired = check(file.content, LEAKS)
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert len(repaired) == len(before) - BLOCK
    sound(MemoryFile(repaired))


def test_checksums_are_made_right() -> None:
    file = filled([0])
    file.content[512 + 36] ^= 1
    assert check(file.content)[1] == ["ERROR: the checksum of the dynamic header is wrong"]
    sound(MemoryFile(check(file.content, ALL)[2]))


def test_wild_entries() -> None:
    rng = random.Random(1)
    file = filled([0, 3, 7])
    for _ in range(100):
        image = bytearray(file.content)
        for _ in range(2):
            value = rng.choice([rng.randrange(1 << 32), rng.randrange(len(image) // 512)])
            struct.pack_into(">I", image, TABLE + 4 * rng.randrange(8), value)
        try:
            disk = open_image(MemoryFile(image))
            assert {one.kind for one in disk.extents(0, SIZE)} <= {Kind.DATA, Kind.ZERO}
            disk.read(0, SIZE)
            disk.write(UNIT + 100, b"x")
            disk.close()
        except LaminaError:
            pass
        try:
            _, _, repaired = check(image, ALL)
        except LaminaError:
            continue
        sound(MemoryFile(repaired))
