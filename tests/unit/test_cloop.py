"""Compressed loop images."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import zlib

import pytest

from lamina.block.node import NodeOptions
from lamina.block.probing import probe
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, LaminaError, Refused
from lamina.formats.cloop import CloopMapping
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.testing.readers import ReaderConformance

PREAMBLE = (
    b"#!/bin/sh\n#V2.0 Format\n"
    b"modprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\nexit $?\n"
)


def pack(content: bytes, block: int = 65536, gap: int = 0) -> bytes:
    parts = [
        zlib.compress(content[start : start + block].ljust(block, b"\0"))
        for start in range(0, len(content), block)
    ]
    place = 136 + 8 * (len(parts) + 1) + gap
    offsets = [place]
    for part in parts:
        place += len(part)
        offsets.append(place)
    head = PREAMBLE.ljust(128, b"\0") + struct.pack(">II", block, len(parts))
    return head + struct.pack(f">{len(offsets)}Q", *offsets) + bytes(gap) + b"".join(parts)


def open_image(content: bytes, **options: bool) -> Disk:
    given = NodeOptions(filename="memory", **{"read_only": True, **options})
    return Disk(NodesContext(MemoryFile(content, given), node_options=given), CloopMapping)


class TestUsual(ReaderConformance):
    def make(self, content):
        return open_image(pack(content))


class TestSmallBlocks(ReaderConformance):
    size = 200 << 10

    def make(self, content):
        return open_image(pack(content, 512, gap=100))


class TestOneBlock(ReaderConformance):
    def make(self, content):
        return open_image(pack(content, 1 << 20))


IMAGE = pack(b"some text" * 20_000)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (128, 0, "block_size cannot be zero"),
        (128, 513, "block_size 513 must be a multiple of 512"),
        (128, 1 << 27, "block_size 134217728 must be 64 MB or less"),
        (132, 0x20000000, "n_blocks 536870912 must be 536870911 or less"),
        (132, 0x1FFFFFFF, "image requires too many offsets, try increasing block size"),
        (132, 0x3FFFFFF, "The offsets lie behind the end of the image"),
        (148, 1, "offsets not monotonically increasing at index 1, image file is corrupt"),
        (160, 1 << 20, "invalid compressed block size at index 3, image file is corrupt"),
    ],
)
def test_headers(offset, value, message):
    image = bytearray(IMAGE)
    struct.pack_into(">I", image, offset, value)
    if offset == 148:
        struct.pack_into(">Q", image, 144, 5)
    with pytest.raises(ImageCorrupt) as caught:
        open_image(bytes(image))
    assert str(caught.value) == message
    assert caught.value.format == "cloop"


def test_no_blocks():
    disk = open_image(pack(b""))
    assert disk.size == 0
    assert disk.info().virtual_size == 0


def test_short_files():
    for length in (0, 100, 135, 140):
        with pytest.raises(ImageCorrupt):
            open_image(IMAGE[:length])


@pytest.mark.parametrize("cut", [1, 100])
def test_blocks_that_are_cut(cut):
    disk = open_image(IMAGE[:-cut])
    assert disk.read(0, 9) == b"some text"
    with pytest.raises(ImageCorrupt, match="Input/output error"):
        disk.read(disk.size - 1, 1)


def test_blocks_of_another_size():
    image = bytearray(IMAGE)
    struct.pack_into(">I", image, 128, 131072)
    disk = open_image(bytes(image))
    with pytest.raises(ImageCorrupt, match="Input/output error"):
        disk.read(0, 1)


def test_many_offsets_are_checked_when_they_are_used():
    count = 3 << 20
    head = bytes(128) + struct.pack(">II", 512, count)
    image = head + bytes(8 * (count + 1))
    start = time.process_time()
    disk = open_image(image)
    assert time.process_time() - start < 1
    with pytest.raises(ImageCorrupt):
        disk.read(disk.size - 512, 512)
    image = bytearray(image)
    struct.pack_into(">Q", image, 136 + 8 * 1000, 5)
    with pytest.raises(ImageCorrupt, match="not monotonically increasing at index 1001"):
        open_image(bytes(image)).read(1000 * 512, 512)


def test_opened_for_writing():
    with pytest.raises(Refused, match="Image is read-only"):
        open_image(IMAGE, read_only=False)
    assert open_image(IMAGE, read_only=False, auto_read_only=True).read_only


def test_probing():
    assert probe(IMAGE[:512]) == "cloop"
    assert open_image(bytes(128) + IMAGE[128:]).read(0, 9) == b"some text"


def test_fuzz():
    rng = random.Random(1)
    opened = 0
    for _ in range(1500):
        image = bytearray(IMAGE)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((128 + rng.randrange(50), rng.randrange(len(image))))
            junk = rng.choice((b"\xff" * 4, bytes(4), b"\1", rng.randbytes(1), rng.randbytes(8)))
            image[at : at + len(junk)] = junk
        with contextlib.suppress(LaminaError):
            disk = open_image(bytes(image))
            opened += 1
            size = min(disk.size, 1 << 18)
            disk.info()
            list(disk.columns(0, size))
            disk.read(0, size)
    assert opened > 300
