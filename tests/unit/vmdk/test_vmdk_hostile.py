"""Images that nobody should have made: an error that says what is wrong, or a read."""

from __future__ import annotations

import random
import struct

import pytest

import lamina
from lamina.block.driver import Fix
from lamina.block.node import NodeOptions
from lamina.errors import ImageCorrupt, LaminaError, Refused
from lamina.formats.vmdk import DRIVER
from lamina.formats.vmdk.descriptor import ExtentLine
from lamina.testing.memory import MemoryFile
from tests.unit.vmdk.images import (
    GRAIN,
    WRITABLE,
    monolithic,
    open_image,
    parent_cid_of,
    sparse_extent,
    split,
    stream,
)

SIZE = 200 * GRAIN
IMAGE = monolithic(SIZE)
READABLE = NodeOptions(read_only=True, filename="memory")


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "invalid VMDK image descriptor"),
        (4, b"\0", "Unsupported VMDK version 0"),
        (4, b"\4", "Unsupported VMDK version 4"),
        (4, b"\xff" * 4, "Unsupported VMDK version 4294967295"),
        (12, struct.pack("<Q", 1 << 60), "L1 size too big"),
        (12, bytes(8), "Unsupported image type 'monolithicSparse'"),
        (20, bytes(8), "L1 entry size is invalid"),
        (20, struct.pack("<Q", 3), "Invalid granularity, image may be corrupt"),
        (20, struct.pack("<Q", 1 << 40), "Invalid granularity, image may be corrupt"),
        (28, struct.pack("<Q", 1 << 50), "invalid VMDK image descriptor"),
        (36, bytes(8), "invalid VMDK image descriptor"),
        (44, struct.pack("<I", 1024), "L2 table size too big"),
        (44, bytes(4), "L1 entry size is invalid"),
        (48, b"\xff" * 8, "Offset lies behind the end of any file"),
        (56, struct.pack("<Q", 1 << 50), "Grain directory lies outside of the image"),
        (56, bytes(8), "Grain directory lies outside of the image"),
        (56, b"\xff" * 8, "Invalid footer"),
        (64, struct.pack("<Q", 1 << 40), f"File truncated, expecting at least {1 << 49} bytes"),
        (73, b"\r\n", "The image was damaged by a transfer in text mode"),
        (8, struct.pack("<I", 0x10003), "Unsupported compression algorithm 0"),
        (512, b"\0", "invalid VMDK image descriptor"),
    ],
)
def test_header_fields(offset: int, data: bytes, message: str) -> None:
    image = bytearray(monolithic(SIZE))
    image[offset : offset + len(data)] = data
    with pytest.raises(LaminaError) as caught:
        open_image(MemoryFile(image, READABLE), options=READABLE)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (77, b"\x09\0"),
        (48, struct.pack("<Q", 1 << 50)),
        (IMAGE.index(b"monolithicSparse"), b"somethingUnknown"),
    ],
)
def test_what_is_tolerated(offset: int, data: bytes) -> None:
    """A way to compress that is not used, no redundant directory, a type that is not asked for."""
    image = bytearray(IMAGE)
    image[offset : offset + len(data)] = data
    disk = open_image(MemoryFile(image))
    disk.write(1000, b"x" * GRAIN)
    disk.close()
    assert open_image(MemoryFile(image)).read(0, SIZE) == bytes(SIZE)


def test_version_3_is_read_only_unless_compressed() -> None:
    image = bytearray(monolithic(SIZE))
    image[4] = 3
    assert open_image(MemoryFile(image, READABLE), options=READABLE).size == SIZE
    with pytest.raises(Refused, match="VMDK version 3 must be read only"):
        open_image(MemoryFile(image))
    fallback = NodeOptions(read_only=False, auto_read_only=True)
    assert open_image(MemoryFile(image), options=fallback).read_only


def test_zero_extents_and_extents_for_reading() -> None:
    """Where QEMU loses count, everything is where the descriptor says."""
    lines = [
        ExtentLine("RDONLY", 8192, "FLAT", "one"),
        ExtentLine("RW", 4096, "ZERO"),
        ExtentLine("RW", 8192, "FLAT", "two"),
        ExtentLine("NOACCESS", 512, "FLAT", "three"),
    ]
    file = MemoryFile(split("twoGbMaxExtentFlat", lines))
    one, two = MemoryFile(b"1" * 8192), MemoryFile(b"2" * 8192)
    disk = open_image(file, one, MemoryFile(), two)
    assert disk.size == 8192 + 4096 + 8192 + 512
    assert disk.read(0, 20480) == b"1" * 8192 + bytes(4096) + b"2" * 8192
    disk.write(12288, b"x" * 8192)
    assert two.content == b"x" * 8192
    for offset in (0, 8192, 12200):
        with pytest.raises(Refused):
            disk.write(offset, b"y" * 100)
    with pytest.raises(LaminaError):
        disk.read(20480, 512)
    assert one.content == b"1" * 8192


@pytest.mark.parametrize("access", ["RDONLY", "NOACCESS", "RW"])
def test_disks_of_one_extent_that_is_no_data(access: str) -> None:
    kind = "ZERO" if access == "RW" else "FLAT"
    line = ExtentLine(access, 8192, kind, "" if kind == "ZERO" else "one")
    disk = open_image(MemoryFile(split("monolithicFlat", [line])), MemoryFile(b"1" * 8192))
    assert disk.size == 8192
    if access == "NOACCESS":
        with pytest.raises(LaminaError):
            disk.read(0, 512)
    else:
        assert disk.read(0, 8192) == (b"1" if kind == "FLAT" else b"\0") * 8192
    with pytest.raises(LaminaError):
        disk.write(0, b"x")


def test_extents_in_one_file(tmp_path) -> None:
    """FLAT ones may be, others may not; and a file has to be there, and what it is said to be."""
    (tmp_path / "file").write_bytes(b"a" * 1024)
    image = tmp_path / "disk.vmdk"
    for kind, name, message in (
        ("SPARSE", "file", "Image not in VMDK format"),
        ("FLAT", "gone", "Could not open .*gone': No such file"),
    ):
        image.write_bytes(split("twoGbMaxExtentFlat", [ExtentLine("RW", 512, kind, name)]))
        with pytest.raises(LaminaError, match=message):
            lamina.open(image, format="vmdk")
    image.write_bytes(split("twoGbMaxExtentFlat", [ExtentLine("RW", 512, "FLAT", "file")] * 2))
    with lamina.open(image, format="vmdk") as disk:
        assert disk.pread(1024, 0) == b"a" * 1024


def test_extents_are_opened_where_the_policy_allows(tmp_path) -> None:
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s" * 512)
    (home / "mine").write_bytes(b"m" * 512)
    (home / "below" / "mine").write_bytes(b"b" * 512)
    (home / "nbd:mine").write_bytes(b"n" * 512)
    (home / "link").symlink_to(tmp_path / "secret")
    names = {
        "mine": b"m",
        "below/mine": b"b",
        "nbd:mine": b"n",
        "../secret": b"s",
        str(tmp_path / "secret"): b"s",
        "link": b"s",
    }
    for name, content in names.items():
        image = home / "disk.vmdk"
        image.write_bytes(split("monolithicFlat", [ExtentLine("RW", 512, "FLAT", name)]))
        with lamina.open(image, format="vmdk") as disk:
            assert disk.pread(1, 0) == content
        if content == b"s":
            with pytest.raises(Refused):
                lamina.open(image, format="vmdk", policy="beside")
        else:
            lamina.open(image, format="vmdk", policy="beside").close()
        with pytest.raises(Refused):
            lamina.open(image, format="vmdk", policy="deny")
        # Nothing is opened to tell what the image says.
        info = lamina.inspect(image)
        assert info.virtual_size == 512
        assert info.specific is not None
        assert info.specific["extents"][0]["filename"] == name


def test_what_names_nothing_is_not_read() -> None:
    file = MemoryFile(monolithic(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * GRAIN)
    disk.close()
    image = bytearray(file.content)
    table = 512 * struct.unpack_from("<I", image, 512 * struct.unpack_from("<Q", image, 56)[0])[0]
    for entry in (0xFFFFFFFF, len(image) // 512):
        struct.pack_into("<I", image, table, entry)
        disk = open_image(MemoryFile(image))
        for action in (
            lambda disk=disk: disk.read(0, 10),
            lambda disk=disk: disk.write(0, b"y"),
            lambda disk=disk: disk.extents(0, GRAIN),
            lambda disk=disk: list(disk.columns(0, SIZE)),
        ):
            with pytest.raises(ImageCorrupt, match="behind the end"):
                action()
        lines: list[str] = []
        assert DRIVER.check(disk, Fix(), lines.append).corruptions == 2
        assert "ERROR: cluster offset for sector 0 points after EOF" in lines
        # The copy knows better. What a child would see changes.
        before = parent_cid_of(disk)
        DRIVER.check(disk, Fix(errors=True), lines.append)
        assert parent_cid_of(disk) != before
        assert disk.read(0, GRAIN) == b"x" * GRAIN
        assert not DRIVER.check(disk, Fix(), lines.append).corruptions


def test_repairs() -> None:
    file = MemoryFile(monolithic(SIZE))
    disk = open_image(file)
    disk.write(0, b"x" * 3 * GRAIN)
    disk.close()
    image = bytearray(file.content) + b"lost" * GRAIN
    directory, redundant = (512 * struct.unpack_from("<Q", image, at)[0] for at in (56, 48))
    image[72] = 1
    struct.pack_into("<I", image, directory, 0x7FFFFFFF)
    copy = 512 * struct.unpack_from("<I", image, redundant + 4)[0]
    struct.pack_into("<I", image, copy, 128)
    file = MemoryFile(image, WRITABLE)
    disk = open_image(file)
    lines: list[str] = []
    everything = Fix(leaks=True, errors=True)
    assert DRIVER.check(disk, Fix(), lines.append).corruptions == 2
    assert DRIVER.check(disk, everything, lines.append).corruptions_fixed == 3
    lines.clear()
    before = parent_cid_of(disk)
    again = DRIVER.check(disk, everything, lines.append)
    assert not again.corruptions, lines
    assert parent_cid_of(disk) == before, lines
    assert disk.read(0, 3 * GRAIN) == b"x" * 3 * GRAIN
    disk.close()
    assert file.content[72] == 0
    assert b"lost" not in file.content


def test_grains_that_share_a_place_are_parted() -> None:
    """Each goes on reading as it did, and none is changed with another one."""
    file = MemoryFile(monolithic(SIZE))
    disk = open_image(file)
    pieces = [random.Random(number).randbytes(GRAIN) for number in range(6)]
    disk.write(0, b"".join(pieces))
    disk.close()
    image = bytearray(file.content)
    for at in (56, 48):
        directory = 512 * struct.unpack_from("<Q", image, at)[0]
        table = 512 * struct.unpack_from("<I", image, directory)[0]
        places = struct.unpack_from("<6I", image, table)
        # Two more names for the first grain, and one that begins in its middle.
        struct.pack_into("<4I", image, table + 8, places[0], places[0] + 4, places[0], places[5])
    middle = (pieces[0] + pieces[1])[2048 : 2048 + GRAIN]
    expected = [pieces[0], pieces[1], pieces[0], middle, pieces[0], pieces[5]]
    lines: list[str] = []
    disk = open_image(MemoryFile(image, READABLE), options=READABLE)
    assert DRIVER.check(disk, Fix(), lines.append).corruptions == 4
    assert lines[0] == "ERROR: 4 grains lie where others do"
    disk = open_image(MemoryFile(image, WRITABLE))
    before = parent_cid_of(disk)
    everything = Fix(leaks=True, errors=True)
    assert DRIVER.check(disk, everything, lines.append).corruptions_fixed == 3
    assert parent_cid_of(disk) == before
    lines.clear()
    # This file has no holes: what was freed is found again, and nothing else.
    assert not DRIVER.check(disk, everything, lines.append).corruptions
    assert lines == ["Leaked 3 grains of memory"]
    assert disk.read(0, 6 * GRAIN) == b"".join(expected)
    for number in range(6):
        disk.write(number * GRAIN, bytes([number]) * GRAIN)
    assert disk.read(0, 6 * GRAIN) == b"".join(bytes([number]) * GRAIN for number in range(6))


def test_wild_images() -> None:
    """Changed anywhere: errors of ours, in bounded time, and nothing outside is touched."""
    rng = random.Random(1)
    plain, packed = MemoryFile(monolithic(SIZE, zeroed=True)), MemoryFile(stream(SIZE))
    disk = open_image(plain)
    disk.write(3, b"guest" * 5000)
    disk.write_zeroes(20 * GRAIN, GRAIN)
    disk.close()
    disk = open_image(packed)
    disk.write(0, b"packed12" * (GRAIN // 8))
    disk.write(150 * GRAIN, rng.randbytes(GRAIN))
    disk.close()
    text = split("twoGbMaxExtentSparse", [ExtentLine("RW", SIZE, "SPARSE", "e")])
    reached = {"opened": 0, "read": 0, "clean": 0}
    for number in range(450):
        content = bytearray((plain, packed)[number % 2].content)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([rng.randrange(0, 80), rng.randrange(2048, 9000)])
            at = min(rng.choice([at, at, rng.randrange(len(content))]), len(content) - 8)
            value = rng.choice(
                [rng.randbytes(8), b"\xff" * 8, bytes(8), struct.pack("<Q", rng.randrange(200))]
            )
            content[at : at + 8] = value
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        files = [MemoryFile(content)]
        if number % 5 == 0:
            files.insert(0, MemoryFile(text))
        _use(files, reached)
    assert reached["opened"] > 200
    assert reached["read"] > 100
    assert reached["clean"] > 100


def _use(files: list[MemoryFile], reached: dict[str, int]) -> None:
    try:
        disk = open_image(*files)
    except LaminaError:
        return
    reached["opened"] += 1
    try:
        size = min(disk.size, SIZE)
        disk.info()
        disk.extents(0, size)
        for _ in disk.columns(0, size):
            pass
        disk.read(0, size)
        reached["read"] += 1
    except LaminaError:
        pass
    if disk.size > 1 << 30:
        return
    try:
        DRIVER.check(disk, Fix(leaks=True, errors=True), lambda line: None)
        again = DRIVER.check(disk, Fix(), lambda line: None)
        reached["clean"] += not again.corruptions
        disk.write(GRAIN, b"after")
    except LaminaError:
        pass
    disk.close()
    assert all(len(file.content) < 1 << 24 for file in files)


def test_extents_without_an_end() -> None:
    """A disk of many tiny extents, and of a file that is too short."""
    lines = [ExtentLine("RW", 512, "FLAT", "one", 512 * number) for number in range(3000)]
    file, data = MemoryFile(split("twoGbMaxExtentFlat", lines)), MemoryFile(b"x" * 1024)
    disk = open_image(file, *[data] * 3000)
    assert disk.read(0, 3000 * 512) == b"x" * 1024 + bytes(2998 * 512)
    disk.write(2999 * 512, b"y" * 512)
    assert len(data.content) == 3000 * 512
    assert sparse_extent(SIZE)[:4] == b"KDMV"


def test_discards_reach_the_files_of_a_flat_disk() -> None:
    lines = [ExtentLine("RW", 8192, "FLAT", name) for name in ("a", "b")]
    files = [MemoryFile(letter * 8192, WRITABLE) for letter in (b"a", b"b")]
    disk = open_image(MemoryFile(split("twoGbMaxExtentFlat", lines)), *files)
    disk.discard(4096, 8192)
    assert disk.read(0, 16384) == b"a" * 4096 + bytes(8192) + b"b" * 4096
