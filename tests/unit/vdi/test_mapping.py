"""VDI images seen through their file: order of writes, static images, parents, damage, resizing."""

from __future__ import annotations

import random
import struct

import pytest

from lamina.block.extents import Kind
from lamina.block.limits import Preallocation
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, UsageError
from lamina.formats.vdi.layout import Header
from lamina.testing.memory import MemoryFile
from tests.unit.vdi.images import ALL, LEAKS, UNIT, WRITABLE, check, make, open_image


def allocated(file: MemoryFile) -> int:
    return struct.unpack_from("<I", file.content, 0x184)[0]


def entries(file: MemoryFile, count: int) -> tuple[int, ...]:
    at = struct.unpack_from("<I", file.content, 0x154)[0]
    return struct.unpack_from(f"<{count}I", file.content, at)


def filled(blocks: list[int], size: int = 5 * UNIT) -> MemoryFile:
    """Each of these blocks holds its number, and they are in the file in this order."""
    file = MemoryFile(make(size), WRITABLE)
    disk = open_image(file)
    for block in blocks:
        disk.write(block * UNIT, bytes([block]) * min(UNIT, size - block * UNIT))
    disk.close()
    return file


def holds(file: MemoryFile, blocks: list[int], size: int) -> None:
    disk = open_image(MemoryFile(file.content))
    assert disk.size == size
    for block in range(-(-size // UNIT)):
        length = min(UNIT, size - block * UNIT)
        value = block if block in blocks else 0
        assert disk.read(block * UNIT, length) == bytes([value]) * length
    result, lines, _ = check(file.content)
    assert (result.corruptions, lines) == (0, [])


def test_whole_blocks_are_in_the_file() -> None:
    file = MemoryFile(make(3 * UNIT), WRITABLE)
    disk = open_image(file)
    disk.write(UNIT + 5, b"data")
    disk.flush()
    assert file.size == 1024 + UNIT
    assert (allocated(file), entries(file, 3)) == (1, (0xFFFFFFFF, 0, 0xFFFFFFFF))


def test_static_images_need_no_map_writes() -> None:
    file = MemoryFile(make(3 * UNIT, static=True), WRITABLE)
    assert file.size == 1024 + 3 * UNIT
    disk = open_image(file)
    before = file.content[:1024]
    disk.write(UNIT, b"x" * UNIT)
    disk.write_zeroes(2 * UNIT, UNIT)
    disk.discard(0, 3 * UNIT)
    disk.close()
    assert file.content[:1024] == before
    assert {extent.kind for extent in disk.extents(0, 3 * UNIT)} == {Kind.DATA}


def test_zeroes_and_discards_take_no_space() -> None:
    file = filled([1])
    disk = open_image(file)
    disk.extents(0, UNIT)
    file.calls.clear()
    disk.write_zeroes(0, 5 * UNIT)
    assert file.calls == ["zero"]
    disk.discard(0, 5 * UNIT)
    assert file.calls == ["zero", "discard"]
    disk.write(UNIT, b"x" * 3 * 4096)
    disk.discard(UNIT + 100, 2 * 4096)
    assert disk.read(UNIT, 3 * 4096) == b"x" * 4096 + bytes(4096) + b"x" * 4096
    disk.close()
    assert allocated(file) == 1


def test_a_count_that_a_crash_left_too_high_is_made_right_by_the_next_block() -> None:
    file = filled([0, 1])
    struct.pack_into("<I", file.content, 0x184, 4)
    assert check(file.content)[1] == ["ERROR: allocated blocks mismatch, is 2, should be 4"]
    disk = open_image(file)
    disk.write(3 * UNIT, b"\3" * UNIT)
    disk.close()
    holds(file, [0, 1, 3], 5 * UNIT)


def test_a_count_that_is_too_low_does_not_overwrite() -> None:
    file = filled([0, 1])
    struct.pack_into("<I", file.content, 0x184, 0)
    disk = open_image(file)
    disk.write(3 * UNIT, b"\3" * UNIT)
    disk.close()
    holds(file, [0, 1, 3], 5 * UNIT)


def test_entries_that_are_too_large() -> None:
    file = filled([0, 1])
    struct.pack_into("<I", file.content, 0x204, 77)
    disk = open_image(MemoryFile(file.content))
    for ask in (lambda: disk.read(UNIT, 5), lambda: list(disk.columns(0, 5 * UNIT))):
        with pytest.raises(ImageCorrupt, match=r"block index \d too large, is 77"):
            ask()


# -- checking and repairing ------------------------------------------------------------------------


def test_repairs() -> None:
    file = filled([4, 2, 0, 1])
    at = 0x200
    # Block 3 says that it is where block 2 is, block 1 is nowhere, and its own place is a gap.
    struct.pack_into("<I", file.content, at + 12, 1)
    struct.pack_into("<I", file.content, at + 4, 99)
    result, lines, same = check(file.content)
    assert same == file.content
    assert result.corruptions == 2
    assert lines == [
        "ERROR: block index 1 too large, is 99",
        "ERROR: block index 1 also used by 1",
    ]
    result, _, fixed = check(file.content, ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 2)
    result, lines, _ = check(fixed)
    assert (result.corruptions, lines) == (0, [])
    disk = open_image(MemoryFile(fixed))
    assert [disk.read(block * UNIT, 1)[0] for block in range(5)] == [0, 0, 2, 2, 4]


def test_gaps_are_filled() -> None:
    file = filled([0, 1, 2, 3])
    struct.pack_into("<2I", file.content, 0x200, 0xFFFFFFFF, 0xFFFFFFFF)
    assert check(file.content)[0].corruptions == 1
    result, _, fixed = check(file.content, LEAKS)
    assert result.corruptions_fixed == 1
    assert len(fixed) == 1024 + 2 * UNIT
    holds(MemoryFile(fixed), [2, 3], 5 * UNIT)


# -- resizing --------------------------------------------------------------------------------------


def test_growing_within_the_map() -> None:
    size = 2 * UNIT + 512
    file = filled([0, 2], size)
    disk = open_image(file)
    disk.truncate(20 * UNIT)
    disk.write(19 * UNIT, b"\x13" * UNIT)
    disk.close()
    disk = open_image(MemoryFile(file.content))
    assert disk.read(2 * UNIT, UNIT) == b"\2" * 512 + bytes(UNIT - 512)
    assert disk.read(19 * UNIT, UNIT) == b"\x13" * UNIT
    assert check(file.content)[0].corruptions == 0


@pytest.mark.parametrize("blocks", [[], [3], [4, 0, 1], [1, 3]])
def test_growing_the_map_moves_the_first_blocks(blocks: list[int]) -> None:
    file = filled(blocks)
    disk = open_image(file)
    disk.truncate(200 * UNIT)
    disk.write(150 * UNIT, b"\x96" * UNIT)
    disk.close()
    assert struct.unpack_from("<II", file.content, 0x154) == (1024, 1024 + UNIT)
    holds(file, [*blocks, 150], 200 * UNIT)


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [4, 1], []])
def test_shrinking_leaves_no_gaps(blocks: list[int]) -> None:
    file = filled(blocks)
    disk = open_image(file)
    disk.truncate(2 * UNIT + 4096)
    left = [block for block in blocks if block <= 2]
    assert allocated(file) == len(left)
    assert file.size == 1024 + len(left) * UNIT
    disk.truncate(5 * UNIT)
    assert disk.read(2 * UNIT + 4096, UNIT) == bytes(UNIT)
    disk.truncate(2 * UNIT)
    disk.close()
    holds(file, [block for block in blocks if block < 2], 2 * UNIT)


def test_static_images_stay_allocated() -> None:
    file = MemoryFile(make(2 * UNIT, static=True), WRITABLE)
    disk = open_image(file)
    disk.truncate(4 * UNIT)
    disk.close()
    assert (allocated(file), entries(file, 4)) == (4, (0, 1, 2, 3))
    disk = open_image(file)
    disk.truncate(5 * UNIT, Preallocation.METADATA)
    disk.close()
    assert allocated(file) == 5
    holds(file, [], 5 * UNIT)


def test_sizes_that_cannot_be() -> None:
    disk = open_image(MemoryFile(make(UNIT)))
    with pytest.raises(LaminaError, match="Unsupported VDI image size"):
        disk.truncate(1 << 50)
    with pytest.raises(UsageError):
        disk.truncate(UNIT + 1)
    with pytest.raises(ImageUnsupported, match="Unsupported preallocation mode 'full'"):
        disk.truncate(2 * UNIT, Preallocation.FULL)
    assert disk.size == UNIT


# -- differencing images ---------------------------------------------------------------------------


def test_what_is_not_here_is_in_the_parent() -> None:
    base = filled([0, 1, 2])
    parent = bytes(base.content[0x188:0x198])
    file = MemoryFile(make(5 * UNIT, parent=parent), WRITABLE)
    disk = open_image(file, open_image(base))
    assert disk.read(2 * UNIT, UNIT) == b"\2" * UNIT
    disk.write(UNIT + 100, b"mine")
    disk.write_zeroes(2 * UNIT, UNIT)
    disk.flush()
    assert entries(file, 3) == (0xFFFFFFFF, 0, 0xFFFFFFFE)
    assert disk.read(UNIT, 105) == b"\1" * 100 + b"mine\1"
    assert disk.read(2 * UNIT, UNIT) == bytes(UNIT)
    assert disk.read(0, 10) == bytes(10)
    assert disk.info().specific is not None
    disk.close()


def test_another_parent_is_refused() -> None:
    image = MemoryFile(make(5 * UNIT, parent=b"somebody else..."))
    with pytest.raises(ImageCorrupt, match="UUID differs"):
        open_image(image, open_image(filled([0])))


def test_wild_entries() -> None:
    rng = random.Random(1)
    file = filled([0, 3], 4 * UNIT)
    for _ in range(40):
        image = bytearray(file.content)
        for _ in range(2):
            value = rng.choice([rng.randrange(1 << 32), rng.randrange(5), 0xFFFFFFFE])
            struct.pack_into("<I", image, rng.choice([0x184, *range(0x200, 0x210, 4)]), value)
        try:
            disk = open_image(MemoryFile(image))
            disk.read(0, 4 * UNIT)
            disk.write(UNIT + 100, b"x")
            disk.close()
        except LaminaError:
            pass
        _, _, fixed = check(image, ALL)
        result, lines, _ = check(fixed)
        assert (result.corruptions, lines) == (0, [])


def test_images_of_virtualbox() -> None:
    """Data begins at a megabyte, the header is longer, blocks are in any order."""
    header = Header(
        5 * UNIT,
        UNIT,
        5,
        3,
        text=b"<<< Oracle VM VirtualBox Disk Image >>>\n",
        header_size=400,
        geometry=(10, 16, 63),
        uuid_image=b"i" * 16,
        uuid_last_snapshot=b"s" * 16,
        rest=struct.pack("<4I", 10, 16, 63, 512).ljust(56, b"\0"),
    )
    table = struct.pack("<5I", 2, 0xFFFFFFFF, 0, 0xFFFFFFFE, 1)
    data = b"".join(bytes([block]) * UNIT for block in (2, 4, 7))
    file = MemoryFile((header.pack() + table).ljust(UNIT, b"\0") + data, WRITABLE)
    disk = open_image(file)
    assert [disk.read(block * UNIT, 1)[0] for block in range(5)] == [7, 0, 2, 0, 4]
    disk.write(UNIT, b"\1" * UNIT)
    disk.truncate(9 * UNIT)
    disk.truncate(4 * UNIT)
    disk.close()
    result, lines, _ = check(file.content)
    assert (result.corruptions, lines) == (0, [])
    disk = open_image(MemoryFile(file.content))
    assert [disk.read(block * UNIT, 1)[0] for block in range(4)] == [7, 1, 2, 0]
    # What is not ours to know stays.
    for start, end in ((0, 0x150), (0x15C, 0x170), (0x174, 0x180), (0x188, 0x200)):
        assert file.content[start:end] == header.pack()[start:end]
