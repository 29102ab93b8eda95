"""VDI between us and QEMU: images written by either, read and checked by the other."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import pytest

from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import ImageUnsupported
from tests.interop.exchange import exercise, exercise_theirs, opened, run, same, sound

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
]

SIZE = (5 << 20) + 512


@pytest.mark.parametrize("static", ["off", "on"])
def test_both_ways(tmp_path: Path, static: str) -> None:
    content = bytearray(SIZE)
    image = tmp_path / "image.vdi"
    rng = random.Random(static)
    create_image(str(image), "vdi", session=Session(), options={"static": static}, size=SIZE)
    exercise(image, "vdi", content, rng)
    same(image, "vdi", content)
    sound(image, "vdi")
    exercise_theirs(image, "vdi", content, rng)
    exercise(image, "vdi", content, rng)
    same(image, "vdi", content)
    sound(image, "vdi")


@pytest.mark.parametrize("static", ["off", "on"])
@pytest.mark.parametrize("size", [0, SIZE, 200 << 20])
def test_same_bytes_as_qemu(tmp_path: Path, static: str, size: int) -> None:
    """But for the UUIDs, which are random."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create_image(str(ours), "vdi", session=Session(), options={"static": static}, size=size)
    run("qemu-img", "create", "-q", "-f", "vdi", "-o", f"static={static}", theirs, size)
    images = []
    for path in (ours, theirs):
        with path.open("rb") as file:
            head = bytearray(file.read(1 << 16))
        assert any(head[0x188:0x198])
        assert any(head[0x198:0x1A8])
        head[0x188:0x1A8] = bytes(32)
        images.append((path.stat().st_size, head))
    assert images[0] == images[1]


@pytest.mark.parametrize(
    "damage",
    [
        [(0x200, 7)],
        [(0x204, 0)],
        [(0x200, 2), (0x204, 2), (0x208, 9)],
        [(0x184, 4)],
        [(0x184, 1)],
        [(0x208, 0xFFFFFFFE)],
    ],
)
def test_checks_agree(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    image = tmp_path / "image.vdi"
    run("qemu-img", "create", "-q", "-f", "vdi", image, SIZE)
    run("qemu-io", "-f", "vdi", "-c", "write 2M 4k", "-c", "write 0 4k", image)
    data = bytearray(image.read_bytes())
    for offset, value in damage:
        struct.pack_into("<I", data, offset, value)
    image.write_bytes(data)
    vdi = driver("vdi")
    lines: list[str] = []
    with opened(image, "vdi", writable=False, check=True) as disk:
        found = vdi.check(disk.node, Fix(), lines.append)
    said = run("qemu-img", "check", "-f", "vdi", image, status=2 if lines else 0)
    assert [line for line in said.splitlines() if line.startswith("ERROR")] == lines
    assert len(lines) == found.corruptions
    with opened(image, "vdi", check=True) as disk:
        vdi.check(disk.node, Fix(leaks=True, errors=True), lines.append)
    sound(image, "vdi")


@pytest.mark.parametrize("size", [1 << 20, 3 << 20, 300 << 20])
def test_qemu_reads_what_was_resized(tmp_path: Path, size: int) -> None:
    image = tmp_path / "image.vdi"
    content = bytearray(SIZE)
    create_image(str(image), "vdi", session=Session(), size=SIZE)
    exercise(image, "vdi", content, random.Random(size))
    with opened(image, "vdi", resize=True) as disk:
        disk.truncate(size)
    sound(image, "vdi")
    same(image, "vdi", content[:size] + bytes(max(size - SIZE, 0)))


def test_a_second_reader_of_differencing_images(tmp_path: Path) -> None:
    """VirtualBox alone makes them: ours is a dynamic one that was told its parent."""
    from dissect.hypervisor.disk.vdi import VDI

    parent, child = tmp_path / "parent.vdi", tmp_path / "child.vdi"
    content = bytearray(SIZE)
    for image in (parent, child):
        create_image(str(image), "vdi", session=Session(), size=SIZE)
    exercise(parent, "vdi", content, random.Random(1), 10)
    data = bytearray(child.read_bytes())
    data[0x4C] = 4
    data[0x1A8:0x1B8] = parent.read_bytes()[0x188:0x198]
    child.write_bytes(data)
    options = {"backing.driver": "vdi", "backing.file.filename": str(parent)}
    with opened(child, "vdi", options=options) as disk:
        assert disk.read(0, SIZE) == content
        disk.write(1_000_000, b"mine" * 30_000)
        disk.write_zeroes(3 << 20, 1 << 20)
        content[1_000_000:1_120_000] = b"mine" * 30_000
        content[3 << 20 : 4 << 20] = bytes(1 << 20)
        assert disk.read(0, SIZE) == content
    with parent.open("rb") as below, child.open("rb") as above:
        stream = VDI(above, VDI(below).open()).open()
        found = bytearray()
        while len(found) < SIZE:  # it reads no further than a block whose neighbour is free
            stream.seek(len(found))
            found += stream.read(min(1 << 20, SIZE - len(found)))
    assert found == content
    with pytest.raises(ImageUnsupported, match="non-NULL link UUID"):
        opened(child, "vdi")
