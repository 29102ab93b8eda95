"""COWD and seSparse, which are only read."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import pytest

import lamina
from lamina.block.driver import Fix
from lamina.block.node import NodeOptions
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, Refused
from lamina.formats.vmdk import DRIVER
from lamina.formats.vmdk.descriptor import ExtentLine
from lamina.testing.memory import MemoryFile
from tests.unit.vmdk.esx import Grains, cowd_image, sesparse_image
from tests.unit.vmdk.images import open_image, split

READABLE = NodeOptions(read_only=True, filename="memory")
RNG = random.Random(5)


def grains(size: int, numbers: list[int]) -> Grains:
    return {number: RNG.randbytes(size) for number in numbers}


def content(size: int, grain: int, held: Grains, below: bytes = b"") -> bytes:
    found = bytearray(below[:size].ljust(size, b"\0"))
    for number, data in held.items():
        found[number * grain : number * grain + len(data)] = data
    return bytes(found)


COWD_SIZE = 9000 * 512
COWD_GRAINS = grains(512, [0, 1, 2, 7, 4095, 4096, 8999, 5])
SE_SIZE = 9000 * 4096
SE_GRAINS = grains(4096, [0, 1, 3, 4095, 4096, 8999, 2])


def test_cowd(tmp_path: Path) -> None:
    image = cowd_image(COWD_SIZE, COWD_GRAINS)
    expected = content(COWD_SIZE, 512, COWD_GRAINS)
    disk = open_image(MemoryFile(image, READABLE), options=READABLE)
    assert disk.size == COWD_SIZE
    assert disk.read(0, COWD_SIZE) == expected
    assert disk.read(100, 5000) == expected[100:5100]
    assert sum(len(piece.kind) for piece in disk.columns(0, COWD_SIZE)) == len(
        disk.extents(0, COWD_SIZE)
    )
    path = tmp_path / "disk.vmdk"
    path.write_bytes(image)
    info = lamina.inspect(path)
    assert (info.format, info.cluster_size, info.specific["create-type"]) == (
        "vmdk",
        512,
        "vmfsSparse",
    )
    with pytest.raises(Refused, match="No write support for vmfsSparse images available"):
        open_image(MemoryFile(image))


def test_cowd_on_a_parent() -> None:
    line = ExtentLine("RW", COWD_SIZE, "VMFSSPARSE", "e")
    text = split("vmfsSparse", [line], parent_cid=1)
    below = RNG.randbytes(COWD_SIZE)
    disk = open_image(
        MemoryFile(text, READABLE),
        MemoryFile(cowd_image(COWD_SIZE, COWD_GRAINS), READABLE),
        backing=below,
        options=READABLE,
    )
    assert disk.read(0, COWD_SIZE) == content(COWD_SIZE, 512, COWD_GRAINS, below)


def test_sesparse() -> None:
    image = sesparse_image(SE_SIZE, SE_GRAINS, unmapped=(10, 11), zero=(12, 4097))
    below = RNG.randbytes(SE_SIZE)
    line = ExtentLine("RW", SE_SIZE, "SESPARSE", "e")
    files = (
        MemoryFile(split("seSparse", [line], parent_cid=1), READABLE),
        MemoryFile(image, READABLE),
    )
    disk = open_image(*files, backing=below, options=READABLE)
    zeroes = {number: bytes(4096) for number in (10, 11, 12, 4097)}
    expected = content(SE_SIZE, 4096, {**SE_GRAINS, **zeroes}, below)
    assert disk.read(0, SE_SIZE) == expected
    assert disk.read(4096 * 4095 + 5, 8000) == expected[4096 * 4095 + 5 :][:8000]
    assert not DRIVER.check(disk, Fix(), print).corruptions
    with pytest.raises(Refused, match="No write support for seSparse images available"):
        open_image(*(MemoryFile(file.content) for file in files), backing=below)


@pytest.mark.parametrize(
    ("offset", "value", "kind"),
    [
        (0, 0xCAFEBABF, ImageCorrupt),
        (8, 0x2_0000_0002, ImageUnsupported),
        (16, 1 << 60, ImageCorrupt),
        (24, 16, ImageUnsupported),
        (32, 32, ImageUnsupported),
        (40, 1, ImageUnsupported),
        (128, 1 << 62, ImageCorrupt),
        (128, 1 << 50, ImageCorrupt),
        (136, 0, ImageCorrupt),
        (512, 1, ImageCorrupt),
        (536, 1, ImageUnsupported),
    ],
)
def test_damaged_sesparse(offset: int, value: int, kind: type[LaminaError]) -> None:
    image = bytearray(sesparse_image(SE_SIZE, SE_GRAINS))
    struct.pack_into("<Q", image, offset, value)
    text = split("seSparse", [ExtentLine("RW", SE_SIZE, "SESPARSE", "e")])
    with pytest.raises(kind):
        open_image(MemoryFile(text, READABLE), MemoryFile(image, READABLE), options=READABLE)


def test_wild_tables() -> None:
    rng = random.Random(6)
    text = split("seSparse", [ExtentLine("RW", SE_SIZE, "SESPARSE", "e")])
    read = 0
    for number in range(200):
        if number % 2:
            image = bytearray(cowd_image(COWD_SIZE, COWD_GRAINS))
            span = (0, 40_000)
        else:
            image = bytearray(sesparse_image(SE_SIZE, SE_GRAINS))
            span = (4096, 40_000)
        for _ in range(3):
            at = rng.randrange(*rng.choice([span, (0, 200)])) // 8 * 8
            image[at : at + 8] = rng.choice([rng.randbytes(8), b"\xff" * 8, bytes(8)])
        files = [MemoryFile(image, READABLE)]
        if not number % 2:
            files.insert(0, MemoryFile(text, READABLE))
        try:
            disk = open_image(*files, options=READABLE)
            disk.read(0, min(disk.size, 1 << 20))
            list(disk.columns(0, min(disk.size, SE_SIZE)))
            DRIVER.check(disk, Fix(), lambda line: None)
            read += 1
        except LaminaError:
            pass
    assert read > 30


def test_another_reader_agrees() -> None:
    vmdk = pytest.importorskip("dissect.hypervisor.disk.vmdk")
    theirs = vmdk.VMDK(io.BytesIO(cowd_image(COWD_SIZE, COWD_GRAINS)))
    expected = content(COWD_SIZE, 512, COWD_GRAINS)
    assert theirs.read_sectors(0, COWD_SIZE // 512) == expected
    image = sesparse_image(SE_SIZE, SE_GRAINS, unmapped=(10,), zero=(12,))
    theirs = vmdk.VMDK(io.BytesIO(image))
    expected = content(SE_SIZE, 4096, SE_GRAINS)
    assert theirs.read_sectors(0, SE_SIZE // 512) == expected
