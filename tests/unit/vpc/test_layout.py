"""The structures of VHD: there and back, and what is wrong with one."""

from __future__ import annotations

import struct

import pytest

from lamina.errors import LaminaError
from lamina.formats.vpc.layout import (
    DIFFERENCING,
    Footer,
    Header,
    Locator,
    has_checksum,
    parse_footer,
    parse_header,
)
from lamina.testing.memory import MemoryFile
from tests.unit.vpc.images import UNIT, fixed, make, open_image, resum

SIZE = 100 * UNIT


def test_footer_round_trip() -> None:
    footer = Footer(
        current_size=5 << 20,
        disk_type=DIFFERENCING,
        geometry=(301, 4, 17),
        data_offset=1536,
        timestamp=123456,
        creator=b"win ",
        creator_version=(6, 3),
        creator_host=b"Mac ",
        original_size=4 << 20,
        unique_id=b"u" * 16,
        saved_state=1,
        features=3,
        version=0x10000,
        rest=b"r" * 427,
    )
    packed = footer.pack()
    assert len(packed) == 512
    assert has_checksum(packed, 64)
    assert parse_footer(packed) == footer


def test_header_round_trip() -> None:
    header = Header(
        table_offset=0x2000,
        max_table_entries=77,
        block_size=1 << 19,
        parent_id=b"p" * 16,
        parent_timestamp=99,
        parent_name="Eltern \U0001f4be.vhd",
        locators=(Locator(b"W2ru", 1, 20, 1536), Locator(b"MacX", 2, 600, 2048)),
    )
    packed = header.pack()
    assert len(packed) == 1024
    assert has_checksum(packed, 36)
    assert parse_header(packed, 77 << 19) == header


@pytest.mark.parametrize(("size", "length"), [(512, 512), (1 << 21, 512), (1 << 22, 1024)])
def test_bitmaps_take_whole_sectors(size: int, length: int) -> None:
    assert Header(0x600, 1, size).bitmap_bytes == length


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "invalid VPC image"),
        (64, b"\0\0", "Incorrect header checksum"),
        (512, b"X", "Invalid header magic"),
        (60, struct.pack(">I", 0), "Unsupported VHD disk type 0"),
        (60, struct.pack(">I", 4), "This differencing VHD image does not name its parent"),
        (60, struct.pack(">I", 9), "Unsupported VHD disk type 9"),
        (16, struct.pack(">Q", 1 << 50), "Invalid header magic"),
        (48, struct.pack(">Q", 1 << 62), "File too large"),
        (544, struct.pack(">I", 0), "Invalid block size 0"),
        (544, struct.pack(">I", 3 << 20), "Invalid block size 3145728"),
        (540, struct.pack(">I", 0), "Page table too small"),
        (540, struct.pack(">I", 0x40000001), "Max Table Entries too large (1073741825)"),
        (540, struct.pack(">I", 1 << 25), "Too many blocks: 33554432, of 4096 bytes"),
        (
            528,
            struct.pack(">Q", 1 << 60),
            "block-vpc: free_data_block_offset points after the end of file. "
            "The image has been truncated.",
        ),
        (
            528,
            struct.pack(">Q", 1537),
            "The block allocation table at 0x601 is not aligned",
        ),
        (
            0x600,
            struct.pack(">I", 1 << 20),
            "block-vpc: free_data_block_offset points after the end of file. "
            "The image has been truncated.",
        ),
    ],
)
def test_hostile_fields(offset: int, data: bytes, message: str) -> None:
    image = bytearray(make(SIZE))
    image[offset : offset + len(data)] = data
    # Whoever lies about the first footer lies about the last one.
    if 8 <= offset < 512 and offset != 64:
        resum(image, 0, 512, 64)
    image[-512:] = image[:512]
    with pytest.raises(LaminaError) as caught:
        open_image(MemoryFile(image))
    assert str(caught.value) == message


def test_short_files() -> None:
    for length in (0, 100, 512, 1000, 1536):
        with pytest.raises(LaminaError):
            open_image(MemoryFile(make(SIZE)[:length]))


def test_a_fixed_disk_larger_than_its_file() -> None:
    image = fixed(SIZE)[: SIZE // 2] + fixed(SIZE)[-512:]
    with pytest.raises(LaminaError, match="The image has been truncated"):
        open_image(MemoryFile(image))


def test_a_header_with_another_checksum() -> None:
    image = bytearray(make(SIZE))
    image[548:552] = b"\1\2\3\4"
    assert open_image(MemoryFile(image)).read(0, SIZE) == bytes(SIZE)


def test_geometry_of_nothing() -> None:
    image = bytearray(make(SIZE))
    image[56:60] = bytes(4)
    resum(image, 0, 512, 64)
    assert open_image(MemoryFile(image)).size == SIZE
