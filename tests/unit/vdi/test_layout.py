"""The header of VDI: there and back, and what is wrong with one."""

from __future__ import annotations

import struct

import pytest

from lamina.errors import LaminaError
from lamina.formats.vdi.layout import MAX_SIZE, Header, parse
from lamina.testing.memory import MemoryFile
from tests.unit.vdi.images import make, open_image

SIZE = 1025 << 10


def test_round_trip() -> None:
    header = Header(
        disk_size=5 << 20,
        offset_data=1 << 20,
        blocks_in_image=7,
        blocks_allocated=3,
        offset_bmap=0x400,
        image_type=4,
        text=b"<<< somebody >>>\n".ljust(64, b"\0"),
        header_size=400,
        image_flags=5,
        description=b"what it is".ljust(256, b"\0"),
        geometry=(1, 2, 3),
        uuid_image=b"a" * 16,
        uuid_last_snapshot=b"b" * 16,
        uuid_link=b"c" * 16,
        uuid_parent=b"d" * 16,
        rest=b"e" * 56,
    )
    packed = header.pack()
    assert len(packed) == 512
    assert parse(packed) == header


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0x40, 0, "Image not in VDI format (bad signature 00000000)"),
        (0x44, 0x00010002, "unsupported VDI image (version 1.2)"),
        (0x154, 0x201, "unsupported VDI image (unaligned block map offset 0x201)"),
        (0x158, 0x401, "unsupported VDI image (unaligned data offset 0x401)"),
        (0x168, 4096, "unsupported VDI image (sector size 4096 is not 512)"),
        (0x178, 2 << 20, "unsupported VDI image (block size 2097152 is not 1048576)"),
        (0x17C, 512, "unsupported VDI image (512 extra bytes in each block)"),
        (0x180, 0, "unsupported VDI image (disk size 1049600, image bitmap has room for 0)"),
        (
            0x180,
            0x20000000,
            "unsupported VDI image (too many blocks 536870912, max is 536870784)",
        ),
        (
            0x174,
            0x10000000,
            "Unsupported VDI image size (size is 0x1000000000100400, "
            f"max supported is {MAX_SIZE:#x})",
        ),
        (0x158, 0x200, "The block map at 0x200 overlaps the header or the data"),
        (0x154, 0, "The block map at 0x0 overlaps the header or the data"),
        (0x1A8, 1, "unsupported VDI image (non-NULL link UUID)"),
        (0x1B8, 1, "unsupported VDI image (non-NULL parent UUID)"),
    ],
)
def test_hostile_fields(offset: int, value: int, message: str) -> None:
    image = bytearray(make(SIZE))
    struct.pack_into("<I", image, offset, value)
    with pytest.raises(LaminaError) as caught:
        open_image(MemoryFile(image))
    assert str(caught.value) == message
    assert caught.value.field
    assert caught.value.offset is not None


def test_a_map_that_is_cut_off() -> None:
    with pytest.raises(LaminaError, match="The block map lies behind the end of the image"):
        open_image(MemoryFile(make(SIZE)[:514]))


def test_odd_sizes_are_rounded_up() -> None:
    image = bytearray(make(SIZE))
    struct.pack_into("<Q", image, 0x170, SIZE - 100)
    assert open_image(MemoryFile(image)).size == SIZE


@pytest.mark.parametrize(("offset", "value"), [(0x48, 0), (0x4C, 4)])
def test_what_is_tolerated(offset: int, value: int) -> None:
    """A header of no length; the type of a differencing image, which names no parent."""
    image = bytearray(make(SIZE))
    struct.pack_into("<I", image, offset, value)
    assert open_image(MemoryFile(image)).read(0, SIZE) == bytes(SIZE)
