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
