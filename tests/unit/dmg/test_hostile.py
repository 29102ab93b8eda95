"""Damaged DMGs: an error that says what is wrong, or a disk that can be read in parts."""

from __future__ import annotations

import contextlib
import random
import struct
import time

import pytest

from lamina.errors import ImageCorrupt, LaminaError
from tests.unit.dmg.images import (
    ENCODERS,
    RAW,
    ZERO,
    Row,
    image,
    open_image,
    pack,
    property_list,
    resource_fork,
    table,
)

ZLIB = 0x80000005
SMALL = pack(b"x" * 4096, (RAW, *ENCODERS), chunk=1, partitions=1)
KOLY = len(SMALL) - 512


def changed(offset: int, data: bytes, base: bytes = SMALL) -> bytes:
    return base[:offset] + data + base[offset + len(data) :]


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "dmg file must be at least 512 bytes long"),
        (SMALL[-511:], "dmg file must be at least 512 bytes long"),
        (changed(KOLY, b"kola"), "Could not locate UDIF trailer in dmg file"),
        (changed(KOLY + 24, u64(1 << 60)), "The data fork lies behind the end of the image"),
        (changed(KOLY + 216, u64(1 << 62)), "The property list lies behind the end of the image"),
        (changed(KOLY + 224, u64(1 << 62)), "The property list lies behind the end of the image"),
        (changed(KOLY + 48, u64(1 << 62)), "The resource fork lies behind the end of the image"),
        (changed(KOLY + 48, u64(1)), "The resource fork is too short"),
        (changed(KOLY + 224, u64(0)), "The image has no block tables"),
        (changed(KOLY + 492, u64(1 << 62)), "File too large"),
        (changed(KOLY + 60, b"\0\0\0\5"), "Images in several segments are not supported"),
    ],
)
def test_trailer(content, message):
    with pytest.raises(LaminaError) as caught:
        open_image(content)
    assert str(caught.value) == message


@pytest.mark.parametrize("behind", [0, 1, 3, 400])
def test_something_behind_the_trailer(behind):
    assert open_image(SMALL + bytes(behind)).read(0, 4096) == b"x" * 4096


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(ZLIB, 0, 131073, 0, 5), "sector count 131073 for chunk 1 is larger than max (131072)"),
        (Row(ZLIB, 0, 1, 0, (64 << 20) + 1),
         "length 67108865 for chunk 1 is larger than max (67108864)"),
        (Row(ZERO, 1 << 62, 1, 0, 0), "A chunk behind number 0 ends behind any disk"),
        (Row(ZERO, 0, 1 << 63, 0, 0), "A chunk behind number 0 ends behind any disk"),
        (Row(RAW, 8, 2, 0, 1024), "Chunks 0 and 1 hold the same sectors"),
    ],
)
def test_chunks(row, message):
    rows = [Row(ZERO, 9, 1, 0, 0), row]
    with pytest.raises(ImageCorrupt) as caught:
        open_image(image(b"x" * 1024, [table(0, rows)], 4))
    assert str(caught.value) == message
    assert caught.value.structure == "block table"


def test_raw_chunks_may_be_large():
    rows = [Row(RAW, 0, 1 << 18, 0, 1 << 27)]
    disk = open_image(image(bytes(1 << 27), [table(0, rows)], 1 << 18))
    assert disk.read((1 << 27) - 512, 512) == bytes(512)


@pytest.mark.parametrize("count", [0, 1, 0xFFFFFFFF])
def test_wrong_chunk_counts(count):
    one = changed(200, struct.pack(">I", count), table(0, [Row(RAW, 0, 1, 0, 512)]))
    disk = open_image(image(b"x" * 512, [one], 1))
    if count:
        assert disk.read(0, 512) == b"x" * 512
    else:
        with pytest.raises(ImageCorrupt):
            disk.read(0, 512)


LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "&%c;&%c;&%c;">' % (n + 1, n, n, n) for n in range(97, 117))
    + b"]><plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key>"
    b"<data>&u;</data></dict></array></dict></dict></plist>"
)
OUTSIDE = (
    b'<!DOCTYPE plist [<!ENTITY a SYSTEM "file:///etc/passwd">]><plist><dict><key>resource-fork'
    b"</key><dict><key>blkx</key><array><dict><key>Data</key><data>&a;</data></dict></array>"
    b"</dict></dict></plist>"
)


@pytest.mark.parametrize(
    ("plist", "message"),
    [
        (LAUGHS, "The XML defines entities, which are not expanded"),
        (OUTSIDE, "The XML defines entities, which are not expanded"),
        (b"<plist>", "Malformed XML: no element found: line 1, column 7"),
        (b"<plist/>", "The property list names no blkx resources"),
        (b"<plist><dict><key>resource-fork</key><dict/></dict></plist>",
         "The property list names no blkx resources"),
        (b"<a>" * 100, "The XML is nested deeper than 64 levels"),
        (b"<a>" + b"<b/>" * 100_001 + b"</a>", "The XML has more than 100000 elements"),
        (property_list([b"xyz"]).replace(b"eHl6", b"eHl"), "A blkx resource is not base64"),
    ],
)
def test_property_lists(plist, message):
    start = time.process_time()
    with pytest.raises(ImageCorrupt) as caught:
        open_image(image(b"", [], 1, plist=plist))
    assert str(caught.value).startswith(message)
    assert time.process_time() - start < 2


def test_huge_property_list():
    content = image(b"", [], 1, plist=b" " * ((64 << 20) + 1))
    with pytest.raises(ImageCorrupt, match="The property list is larger than 67108864 bytes"):
        open_image(content)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"\xff\xff\xff\xff", "The data of the resource fork ends behind its end"),
        (8, b"\xff\xff\xff\xff", "The data of the resource fork ends behind its end"),
        (256, b"\xff\xff\xff\xff", "A resource ends behind the data of the resource fork"),
    ],
)
def test_resource_forks(at, data, message):
    content = pack(b"x" * 512, (RAW,), partitions=1, binary=True)
    with pytest.raises(ImageCorrupt, match=message):
        open_image(changed(512 + at, data, content))


def test_many_block_tables():
    content = image(b"", [], 1, binary=True)
    fork = resource_fork([table(0, [Row(ZERO, 0, 1, 0, 0)])] * 10_001)
    trailer = bytearray(content[-512:])
    struct.pack_into(">QQ", trailer, 40, 0, len(fork))
    with pytest.raises(ImageCorrupt, match="There are more than 10000 block tables"):
        open_image(fork + trailer)


def test_very_many_chunks_open_quickly():
    """60 GiB in chunks of 256 KiB."""
    count = 245_760
    rows = bytearray(struct.pack(">IIQQQQ", ZLIB, 0, 0, 512, 0, 4)) * count
    for number in range(count):
        struct.pack_into(">Q", rows, number * 40 + 8, number * 512)
    one = table(0, [Row(ZLIB, 0, 1, 0, 4)])
    one = one[:200] + struct.pack(">I", count) + rows
    content = image(b"junk", [one], count * 512)
    start = time.process_time()
    disk = open_image(content)
    assert time.process_time() - start < 1
    assert disk.size == 60 << 30
    assert len(disk.extents(disk.size - (1 << 20), 1 << 20)) == 4


def test_fuzz():
    rng = random.Random(1)
    seeds = [
        SMALL,
        pack(bytes(2048) + b"abc" * 2048, (RAW, ZLIB), chunk=3, binary=True),
        pack(b"y" * 2048, (0x80000004,), chunk=2),
    ]
    opened = read = 0
    for number in range(3000):
        content = bytearray(seeds[number % 3])
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((len(content) - 512 + rng.randrange(512), rng.randrange(len(content))))
            junk = rng.choice((b"\xff", bytes(4), b"\x7f" * 8, rng.randbytes(1), rng.randbytes(8)))
            content[at : at + len(junk)] = junk
        with contextlib.suppress(LaminaError):
            disk = open_image(bytes(content))
            opened += 1
            disk.extents(0, min(disk.size, 1 << 20))
            list(disk.columns(0, min(disk.size, 1 << 20)))
            disk.info()
            disk.read(0, min(disk.size, 8192))
            read += 1
    assert 500 < read < opened < 3000
