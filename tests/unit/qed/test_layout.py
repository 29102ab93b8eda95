"""The header of QED: there and back, and what is wrong with one."""

from __future__ import annotations

import struct

import pytest

from lamina.errors import LaminaError
from lamina.formats.qed.layout import (
    BACKING_FILE,
    NEED_CHECK,
    NO_PROBE,
    SIZE,
    Header,
    max_image_size,
    parse,
)
from tests.unit.qed.images import make

FILE = 1 << 20


def test_round_trip() -> None:
    header = Header(
        image_size=5 << 20,
        cluster_size=8192,
        table_size=2,
        header_size=3,
        features=BACKING_FILE | NEED_CHECK | NO_PROBE,
        compat_features=1 << 60,
        autoclear_features=1 << 50,
        l1_table_offset=8192 * 4,
        backing_offset=100,
        backing_size=50,
    )
    packed = header.pack()
    assert len(packed) == SIZE
    assert parse(packed, FILE) == header


def test_largest_disks() -> None:
    assert max_image_size(65536, 4) == 64 << 40
    assert max_image_size(4096, 1) == 512 * 512 * 4096


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, "X", "Image not in QED format"),
        (4, 3000, "QED cluster size is invalid"),
        (4, 1024, "QED cluster size is invalid"),
        (4, 128 << 20, "QED cluster size is invalid"),
        (8, 0, "QED table size is invalid"),
        (8, 3, "QED table size is invalid"),
        (8, 32, "QED table size is invalid"),
        (12, 0, "QED header size is invalid"),
        (12, 0x7FFFFFFF, "QED table offset is invalid"),
        (16, 8, "Unsupported QED features: 8"),
        (40, 65537, "QED table offset is invalid"),
        (40, 1 << 40, "QED table offset is invalid"),
        (40, 0, "QED table offset is invalid"),
        (48, 1 << 62, "QED image size is invalid"),
        (48, 1000, "QED image size is invalid"),
        (56, 0x7FFFFFFF, "QED backing filename offset is invalid"),
        (60, 0x7FFFFFFF, "QED backing filename offset is invalid"),
        (60, 2000, "QED backing filename offset is invalid"),
    ],
)
def test_hostile_fields(offset: int, value: int | str, message: str) -> None:
    image = bytearray(make(1 << 20, cluster_size=65536, backing_file="b", backing_fmt="raw"))
    if isinstance(value, str):
        image[offset : offset + 1] = value.encode()
    else:
        struct.pack_into("<I" if offset < 16 or offset > 48 else "<Q", image, offset, value)
    with pytest.raises(LaminaError) as caught:
        parse(bytes(image), len(image))
    assert str(caught.value) == message
    assert caught.value.field
    assert caught.value.offset is not None


def test_what_is_tolerated() -> None:
    image = bytearray(make(1 << 20, cluster_size=65536))
    for offset in (24, 32):
        struct.pack_into("<Q", image, offset, 1 << 63)
    struct.pack_into("<Q", image, 48, 0)
    assert parse(bytes(image), len(image)).image_size == 0
