"""The bitmap directory and tables: what is read is what was written, and the rest is refused."""

from __future__ import annotations

from array import array

import pytest

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.qcow2.bitmap_layout import (
    IN_USE,
    BitmapEntry,
    check_entry,
    check_loadable,
    check_table,
    pack_directory,
    parse_directory,
    table_entries,
)
from lamina.formats.qcow2.layout import Header

UNIT = 65536
IMAGE = Header(size=1 << 30)


def entry(**changes: object) -> BitmapEntry:
    fields = {
        "name": "b0",
        "table_offset": 6 * UNIT,
        "table_size": 1,
        "flags": 2,
        "granularity_bits": 16,
        **changes,
    }
    return BitmapEntry(**fields)  # type: ignore[arg-type]


def test_directories_survive() -> None:
    entries = [entry(), entry(name="another \udcff", flags=3, granularity_bits=12)]
    directory = pack_directory(entries)
    assert list(parse_directory(directory, 2)) == entries
    assert len(directory) == sum(one.length for one in entries)
    with pytest.raises(ImageCorrupt, match="More bitmaps found"):
        list(parse_directory(directory, 1))
    with pytest.raises(ImageCorrupt, match="Less bitmaps found"):
        list(parse_directory(directory, 3))
    with pytest.raises(ImageCorrupt, match="Requested bitmap directory size is zero"):
        list(parse_directory(b"", 1))
    for cut in range(1, len(directory)):
        if cut != entries[0].length:
            with pytest.raises(ImageCorrupt, match="Broken bitmap directory"):
                list(parse_directory(directory[:cut], 2))


def test_extra_data_is_refused() -> None:
    directory = bytearray(pack_directory([entry()]))
    directory[23] = 8
    with pytest.raises(ImageUnsupported, match="Bitmap extra data is not supported"):
        list(parse_directory(bytes(directory), 1))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 1024},
        {"name": "a\0b"},
        {"table_offset": 5},
        {"table_offset": 0},
        {"table_size": 0},
        {"table_size": 8193},
        {"flags": 4},
        {"flags": 8},
        {"type": 2},
        {"granularity_bits": 8},
        {"granularity_bits": 32},
        {"granularity_bits": 200},
        # Too short for a gigabyte in units of 512 bytes.
        {"granularity_bits": 9},
    ],
)
def test_entries_that_cannot_be(change: dict[str, object]) -> None:
    check_entry(entry(), 0, IMAGE)
    with pytest.raises(ImageCorrupt, match="doesn't satisfy the constraints"):
        check_entry(entry(**change), 0, IMAGE)


def test_bitmaps_in_use_may_not_have_followed_a_resize() -> None:
    check_entry(entry(granularity_bits=9, flags=IN_USE), 0, IMAGE)
    with pytest.raises(ImageCorrupt, match="Could not read bitmap 'b0' from image"):
        check_loadable(entry(table_size=2), 0, IMAGE)
    far = entry(table_offset=(1 << 64) - UNIT)
    check_entry(far, 0, IMAGE)
    with pytest.raises(ImageCorrupt, match="Could not read bitmap_table table from image"):
        check_loadable(far, 0, IMAGE)


@pytest.mark.parametrize("word", [2, 1 << 60, 6 * UNIT + 512, 6 * UNIT | 1, 3])
def test_tables_that_cannot_be(word: int) -> None:
    check_table(array("Q", [0, 1, 6 * UNIT, (1 << 56) - UNIT]), entry(), IMAGE)
    with pytest.raises(ImageCorrupt, match="bitmap 'b0': Invalid argument") as caught:
        check_table(array("Q", [0, word]), entry(), IMAGE)
    assert caught.value.offset == 6 * UNIT + 8


def test_lengths_of_tables() -> None:
    for size, granularity, entries in (
        (1, 512, 1),
        (UNIT * UNIT * 8, UNIT, 1),
        (UNIT * UNIT * 8 + 1, UNIT, 2),
        (1 << 40, 512, 4096),
    ):
        assert table_entries(Header(size=size), granularity) == entries
