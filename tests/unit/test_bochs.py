"""Growing and sparse images of Bochs."""

from __future__ import annotations

import contextlib
import random
import struct
from array import array

import pytest

from lamina.block.extents import Kind
from lamina.block.node import NodeOptions
from lamina.block.probing import probe
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, Refused
from lamina.formats.bochs import NOWHERE, _load
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.testing.readers import ReaderConformance

SECTOR = 512


def redolog(content: bytes, extent: int = 4096, *, version: int = 0x20000, seed: int = 1) -> bytes:
    """Only sectors that are not zero are there; extents lie in any order."""
    per_extent = extent // SECTOR
    count = -(-len(content) // extent)
    bitmap = max(-(-per_extent // 8), 1)
    catalog = [NOWHERE] * (count + 3)
    wanted = [n for n in range(count) if any(content[n * extent : (n + 1) * extent])]
    random.Random(seed).shuffle(wanted)
    body = bytearray()
    for place, number in enumerate(wanted):
        catalog[number] = place
        bits = 0
        data = content[number * extent : (number + 1) * extent].ljust(extent, b"\0")
        for sector in range(per_extent):
            if any(data[sector * SECTOR : (sector + 1) * SECTOR]):
                bits |= 1 << sector
            else:
                # Whatever lies where nothing was written must not be seen.
                data = data[: sector * SECTOR] + b"?" * SECTOR + data[(sector + 1) * SECTOR :]
        body += bits.to_bytes(-(-bitmap // SECTOR) * SECTOR, "little") + data
    head = struct.pack("<32s16s16s", b"Bochs Virtual HD Image", b"Redolog", b"Growing")
    head += struct.pack("<IIIII", version, 512, len(catalog), bitmap, extent)
    head += (b"time" if version == 0x20000 else b"") + struct.pack("<Q", len(content))
    return head.ljust(512, b"\0") + array("I", catalog).tobytes() + body


def sparse(content: bytes, page: int = 4096) -> bytes:
    count = -(-len(content) // page)
    pages = [NOWHERE] * count
    wanted = [n for n in range(count) if any(content[n * page : (n + 1) * page])]
    random.Random(2).shuffle(wanted)
    body = bytearray()
    for place, number in enumerate(wanted):
        pages[number] = place
        body += content[number * page : (number + 1) * page].ljust(page, b"\0")
    head = struct.pack("<IIIIQ", 0x02468ACE, 2, page, count, len(content)).ljust(256, b"\0")
    head += array("I", pages).tobytes()
    return head.ljust(-(-len(head) // page) * page, b"\0") + body


def open_image(content: bytes, **options: bool) -> Disk:
    given = NodeOptions(filename="memory", **{"read_only": True, **options})
    return Disk(NodesContext(MemoryFile(content, given), node_options=given), _load)


class TestGrowing(ReaderConformance):
    def make(self, content):
        return open_image(redolog(content))


class TestLargeExtents(ReaderConformance):
    size = (1 << 20) - 512

    def make(self, content):
        return open_image(redolog(content, 1 << 17, version=0x10000))


class TestTinyExtents(ReaderConformance):
    size = 100 << 10

    def make(self, content):
        return open_image(redolog(content, 512))


class TestSparse(ReaderConformance):
    size = (1 << 20) - 1024

    def make(self, content):
        return open_image(sparse(content))


@pytest.mark.parametrize("extent", [512, 4096, 65536, 1 << 20])
def test_single_sectors(extent):
    rng = random.Random(extent)
    content = bytearray(1 << 20)
    for sector in rng.sample(range(2048), 300):
        content[sector * SECTOR : (sector + 1) * SECTOR] = rng.randbytes(SECTOR)
    disk = open_image(redolog(bytes(content), extent))
    assert disk.read(0, len(content)) == content
    for _ in range(200):
        offset = rng.randrange(len(content))
        length = min(rng.randrange(1, 5000), len(content) - offset)
        assert disk.read(offset, length) == content[offset : offset + length]
    zero = sum(one.length for one in disk.extents(0, 1 << 20) if one.kind is Kind.ZERO)
    assert zero == 1748 * SECTOR


GROWING = redolog(bytes(8192) + b"x" * 57_344)
SPARSE = sparse(bytes(8192) + b"x" * 57_344)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 0, "Image not in Bochs format"),
        (32, 0, "Image not in Bochs format"),
        (48, 0x6F646E55, "Image not in Bochs format"),
        (64, 0x30000, "Image not in Bochs format"),
        (64, 0x10000, "Catalog size is too small for this disk size"),
        (68, 0x7FFFFFFF, "The table of places lies behind the end of the image"),
        (72, 0x100001, "Catalog size is too large"),
        (72, 0x100000, "The table of places lies behind the end of the image"),
        (72, 1, "Catalog size is too small for this disk size"),
        (76, 0, "Bitmap size 0 does not suit the extents"),
        (76, 0xFFFFFFFF, "Bitmap size 4294967295 does not suit the extents"),
        (80, 0, "Extent size must be at least 512"),
        (80, 3000, "Extent size 3000 is not a power of two"),
        (80, 1 << 24, "Extent size 16777216 is too large"),
        (92, 1 << 30, "Catalog size is too small for this disk size"),
    ],
)
def test_growing_headers(offset, value, message):
    image = bytearray(GROWING)
    struct.pack_into("<I", image, offset, value)
    with pytest.raises(ImageCorrupt) as caught:
        open_image(bytes(image))
    assert str(caught.value) == message
    assert caught.value.field


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, 1, "Sparse Bochs image of version 1 is not supported"),
        (8, 0, "Page size 0 is not supported"),
        (8, 3000, "Page size 3000 is not supported"),
        (8, 1 << 31, "Page size 2147483648 is not supported"),
        (12, 3, "Page table is too small for this disk size"),
        (12, 1 << 28, "The table of places lies behind the end of the image"),
        (12, 0xFFFFFFFF, "Page table is too large"),
        (20, 1, "Page table is too small for this disk size"),
        (16, 5, "Page table is too small for this disk size"),
    ],
)
def test_sparse_headers(offset, value, message):
    image = bytearray(SPARSE)
    struct.pack_into("<I", image, offset, value)
    with pytest.raises((ImageCorrupt, ImageUnsupported)) as caught:
        open_image(bytes(image))
    assert str(caught.value) == message


@pytest.mark.parametrize(("image", "table"), [(GROWING, 512), (SPARSE, 256)])
@pytest.mark.parametrize("entry", [1000, 0xFFFFFFFE])
def test_places_outside(image, table, entry):
    changed = bytearray(image)
    struct.pack_into("<I", changed, table + 4 * 5, entry)
    disk = open_image(bytes(changed))
    assert disk.read(8192, 4096) == b"x" * 4096
    with pytest.raises(ImageCorrupt, match="Input/output error"):
        disk.read(5 * 4096, 1)


def test_short_files():
    for image, least in ((GROWING, 512 + 4 * 19), (SPARSE, 256 + 4 * 16)):
        for length in (0, 10, 255, least - 1):
            with pytest.raises(ImageCorrupt):
                open_image(image[:length])


def test_opened_for_writing():
    for image in (GROWING, SPARSE):
        with pytest.raises(Refused, match="Image is read-only"):
            open_image(image, read_only=False)
        assert open_image(image, read_only=False, auto_read_only=True).read_only


def test_probing():
    assert probe(GROWING[:512]) == "bochs"
    assert probe(SPARSE[:512]) == "bochs"


def test_fuzz():
    rng = random.Random(1)
    opened = 0
    for number in range(2000):
        image = bytearray((GROWING, SPARSE)[number % 2])
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(100), rng.randrange(700)))
            junk = rng.choice((b"\xff" * 4, bytes(4), b"\1", rng.randbytes(1), rng.randbytes(4)))
            image[at : at + len(junk)] = junk
        with contextlib.suppress(LaminaError):
            disk = open_image(bytes(image))
            size = min(disk.size, 1 << 17)
            disk.info()
            opened += 1
            disk.extents(0, size)
            list(disk.columns(0, size))
            disk.read(0, size)
    assert opened > 500
