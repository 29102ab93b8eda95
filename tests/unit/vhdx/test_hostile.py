"""Damaged images end in an error that names the place, or in a read; never in anything else."""

from __future__ import annotations

import random
import struct
import time
from contextlib import suppress

import pytest

from lamina.block.driver import Fix
from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.vhdx import layout
from lamina.formats.vhdx.check import check
from lamina.formats.vhdx.layout import new_guid
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB
from tests.unit.vhdx.images import READ_ONLY, filled, logged, make, open_image

SIZE = 5 * MIB
IMAGE = filled(make(SIZE), b"data" * 1000)
BAT, METADATA = 2 * MIB, 3 * MIB
ITEMS = METADATA + 64 * KIB
TABLES = (192 * KIB, 256 * KIB)


def damaged(*patches: tuple[int, bytes], sums: bool = True, image: bytes = IMAGE) -> MemoryFile:
    """``sums``: with checksums that fit, where there are some."""
    file = MemoryFile(image)
    for offset, data in patches:
        file.write(offset, data)
    if sums:
        for offset in layout.HEADER_OFFSETS:
            file.write(offset, layout.with_checksum(file.read(offset, 4 * KIB)))
        for offset in TABLES:
            file.write(offset, layout.with_checksum(file.read(offset, 64 * KIB)))
    return file


def both(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """Of both headers or both region tables."""
    second = 128 * KIB - 64 * KIB if offset < 128 * KIB else 64 * KIB
    return [(offset, data), (offset + second, data)]


REFUSED = [
    ("file signature", [(0, b"X")], "not in VHDX format"),
    ("both headers", both(64 * KIB, b"X"), "No valid VHDX header found"),
    ("header version", both(64 * KIB + 66, b"\2"), "No valid VHDX header found"),
    ("log version", both(64 * KIB + 64, b"\1"), "log version 1"),
    ("no region table", both(192 * KIB, b"X"), "no signature"),
    ("region entries", both(192 * KIB + 8, struct.pack("<I", 3000)), "3000 entries"),
    ("no BAT", both(192 * KIB + 16, bytes(16)), "VHDX region 0000.* is not supported"),
    ("unknown region", both(192 * KIB + 16, b"\1" * 16 + bytes(12) + b"\1"), "not aligned"),
    ("overlap", both(192 * KIB + 64, struct.pack("<Q", BAT)), "overlaps with region"),
    ("metadata signature", [(METADATA, b"X")], "metadata table has no signature"),
    ("metadata entries", [(METADATA + 10, struct.pack("<H", 3000))], "3000 entries"),
    ("unknown item", [(METADATA + 32, b"\1" * 16)], "is not supported"),
    ("block size 0", [(ITEMS, struct.pack("<I", 0))], "block size 0"),
    ("block size 3M", [(ITEMS, struct.pack("<I", 3 * MIB))], "block size 3145728"),
    ("block size 512M", [(ITEMS, struct.pack("<I", 512 * MIB))], "block size"),
    ("parent", [(ITEMS + 4, b"\2")], "no parent locator"),
    ("disk size", [(ITEMS + 8, struct.pack("<Q", 1 << 50))], "larger than 64 TiB"),
    ("BAT too short", [(ITEMS + 8, struct.pack("<Q", 1 << 45))], "BAT is too short"),
    ("sector size", [(ITEMS + 32, struct.pack("<I", 0))], "logical sector size 0"),
    ("BAT start", [(BAT, struct.pack("<Q", 1 << 50 | 6))], "BAT entry 0 start offset"),
]


@pytest.mark.parametrize(("kind", "patches", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_structures(kind, patches, message):
    with pytest.raises(LaminaError, match=message) as caught:
        open_image(damaged(*patches), node_options=READ_ONLY)
    assert caught.value.path == "memory"
    assert caught.value.structure


OPENED = [
    ("one header", [(64 * KIB, b"X")]),
    ("the other header", [(128 * KIB, b"X")]),
    ("log length", both(64 * KIB + 68, struct.pack("<I", 1000))),
    ("log offset", both(64 * KIB + 72, struct.pack("<Q", 1 << 50))),
    ("log without entries", both(64 * KIB + 48, b"\1" * 16)),
    ("one region table", [(192 * KIB, b"X")]),
    ("the other region table", [(256 * KIB + 20, b"X")]),
    ("disk size 513", [(ITEMS + 8, struct.pack("<Q", 513))]),
    ("reserved bits of an entry", [(BAT, bytes([IMAGE[BAT] | 8]))]),
    ("unmapped, as drafts had it", [(BAT, struct.pack("<Q", 5))]),
]


@pytest.mark.parametrize(("kind", "patches"), OPENED, ids=[row[0] for row in OPENED])
def test_what_does_no_harm(kind, patches):
    disk = open_image(damaged(*patches), node_options=READ_ONLY)
    expected = bytes(4000) if kind.startswith("unmapped") else b"data" * 1000
    assert disk.read(0, min(disk.size, 4000)) == expected[: disk.size]
    disk.close()


def test_headers_of_the_same_number_may_be_equal_and_nothing_else():
    first = MemoryFile(IMAGE).read(64 * KIB, 4 * KIB)
    same = damaged((128 * KIB, first))
    assert open_image(same, node_options=READ_ONLY).read(0, 4) == b"data"
    other = damaged((128 * KIB, first), (128 * KIB + 16, new_guid()))
    with pytest.raises(ImageCorrupt, match="same sequence number"):
        open_image(other, node_options=READ_ONLY)


@pytest.mark.parametrize(
    ("length", "offset"), [(1000, MIB), (MIB, 1 << 50), (0, MIB), (MIB, 0), (MIB, BAT)]
)
def test_writing_needs_a_log(length, offset):
    """Reading does without, as long as it is empty."""
    patches = [
        *both(64 * KIB + 68, struct.pack("<I", length)),
        *both(64 * KIB + 72, struct.pack("<Q", offset)),
    ]
    with open_image(damaged(*patches), node_options=READ_ONLY) as disk:
        assert disk.read(0, 4) == b"data"
        with pytest.raises(ImageCorrupt):
            disk.reopen(read_only=False)
    with pytest.raises(ImageCorrupt):
        open_image(damaged(*patches))


def test_the_last_sequence_number():
    file = damaged(*both(64 * KIB + 8, b"\xfe" + b"\xff" * 7), (128 * KIB + 8, b"\xff"))
    with open_image(file) as disk, pytest.raises(ImageCorrupt, match="used up"):
        disk.write(0, b"x")


@pytest.mark.parametrize("state", [4, 7])
def test_states_that_cannot_be(state):
    place = MemoryFile(IMAGE).read(BAT, 8)
    file = damaged((BAT, bytes([place[0] & 0xF8 | state]) + place[1:]))
    with open_image(file) as disk:
        for action in (lambda: disk.read(0, 512), lambda: disk.write(0, b"x")):
            with pytest.raises(ImageCorrupt, match=f"has the state {state}"):
                action()
        assert disk.read(MIB, 512) == bytes(512)


@pytest.mark.parametrize("place", [0, MIB, BAT, METADATA])
def test_blocks_are_not_where_other_things_are(place):
    """Neither is metadata shown to the guest, nor may the guest change it."""
    file = damaged((BAT + 8, struct.pack("<Q", place | 6)))
    with open_image(file) as disk:
        for action in (lambda: disk.read(MIB, 512), lambda: disk.write(MIB, b"x")):
            with pytest.raises(ImageCorrupt, match="lies outside of the image"):
                action()
        assert disk.read(0, 4) == b"data"


def test_a_block_that_is_cut():
    """QEMU's rule: refused for reading; the file is made longer for writing."""
    file = damaged((BAT + 8, struct.pack("<Q", len(IMAGE) - MIB + 6)), image=IMAGE + bytes(512))
    cut = MemoryFile(bytes(file.content[: len(IMAGE) - 4096]))
    with pytest.raises(ImageCorrupt, match=r"BAT entry 1 end offset .* after end of file"):
        open_image(cut, node_options=READ_ONLY)
    with open_image(cut) as disk:
        assert cut.size == len(IMAGE)
        assert disk.read(MIB, MIB) == bytes(MIB)


def test_a_bitmap_that_is_missing():
    parent = filled(make(SIZE), b"p" * 3 * MIB)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(100, b"x")
    disk = open_image(file, parent=parent)
    disk.mapping.bat.set_bitmap(0, 0)
    with pytest.raises(ImageCorrupt, match="has no bitmap"):
        disk.read(0, 512)
    disk.mapping.bat.set_bitmap(0, 1 << 50 | 6)
    with pytest.raises(ImageCorrupt, match="sector bitmap at"):
        disk.read(0, 512)


def test_a_parent_that_has_changed():
    parent = filled(make(SIZE), b"p" * 3 * MIB)
    image = make(SIZE, parent=parent)
    with open_image(MemoryFile(image), parent=parent) as disk:
        assert disk.read(0, 4) == b"pppp"
    changed = filled(parent, b"q")
    with pytest.raises(ImageCorrupt, match="has changed since this image was made") as caught:
        open_image(MemoryFile(image), parent=changed)
    assert "rebase -u" in caught.value.hint
    with open_image(MemoryFile(image), parent=changed, check=True) as disk:
        assert check(disk.mapping, Fix(), lambda line: None).corruptions == 1


def test_a_bitmap_of_single_bits_takes_little_time():
    size = 64 * MIB
    parent = filled(make(size), b"p")
    file = MemoryFile(make(size, parent=parent, block_size=64 * MIB))
    with open_image(file, parent=parent) as disk:
        disk.write(0, b"x")
        disk.flush()
        place = disk.mapping.bitmaps.host_offset(0)
        table = disk.mapping.bitmaps.tables.get(place)
        table[: 16 * KIB] = b"\x55" * (16 * KIB)
        start = time.process_time()
        extents = disk.extents(0, size)
        assert len(extents) == size // 512
        assert time.process_time() - start < 3


def test_wild_pointers():
    """Any eight bytes of any structure: an error of ours, no hang, no memory."""
    rng = random.Random(1)
    parent = filled(make(SIZE), b"p" * 3 * MIB)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(100, b"x" * 3000)
        disk.write(2 * MIB, b"y" * MIB)
    overlay = bytes(file.content)
    dirty = logged(IMAGE, [(0, 1, 0), (12288, 2, 0)])
    places = [
        *(64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB),
        *(MIB, MIB + 12288, BAT, METADATA, ITEMS, 4 * MIB),
    ]
    opened = 0
    for number in range(250):
        image, below = (overlay, parent) if number % 2 else (dirty, None)
        patches = []
        for _ in range(3):
            junk = rng.choice(
                [rng.randbytes(8), b"\xff" * 8, struct.pack("<Q", rng.randrange(len(image)))]
            )
            patches.append((rng.choice(places) + rng.randrange(0, 96, 4), junk))
        file = damaged(*patches, sums=rng.random() < 0.8, image=image)
        try:
            disk = open_image(file, parent=below, check=rng.random() < 0.3)
        except LaminaError:
            continue
        opened += 1
        assert len(file.content) < 40 * MIB
        for action in (
            lambda disk=disk: disk.read(0, min(disk.size, SIZE)),
            lambda disk=disk: disk.write(100, b"x"),
            lambda disk=disk: check(disk.mapping, Fix(), lambda line: None),
            lambda disk=disk: check(disk.mapping, Fix(errors=True), lambda line: None),
            disk.close,
        ):
            with suppress(LaminaError):
                action()
    assert opened > 100
