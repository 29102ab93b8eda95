"""QED between us and QEMU: images written by either, read and checked by the other."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
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

SIZE = 5 << 20
KINDS = {
    "plain": {},
    "small": {"cluster_size": "4k", "table_size": "2"},
    "backed": {"backing_file": "base.raw", "backing_fmt": "raw", "cluster_size": "16k"},
}


def base(home: Path, kind: str) -> bytearray:
    if kind != "backed":
        return bytearray(SIZE)
    content = random.Random(5).randbytes(SIZE - 100_000)
    (home / "base.raw").write_bytes(content)
    return bytearray(content.ljust(SIZE, b"\0"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_ways(tmp_path: Path, kind: str) -> None:
    content = base(tmp_path, kind)
    image = tmp_path / "image.qed"
    rng = random.Random(kind)
    create_image(str(image), "qed", session=Session(), options=KINDS[kind], size=SIZE)
    exercise(image, "qed", content, rng)
    same(image, "qed", content)
    sound(image, "qed")
    exercise_theirs(image, "qed", content, rng)
    exercise(image, "qed", content, rng)
    same(image, "qed", content)
    sound(image, "qed")


@pytest.mark.parametrize("kind", list(KINDS))
def test_same_bytes_as_qemu(tmp_path: Path, kind: str) -> None:
    base(tmp_path, kind)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create_image(str(ours), "qed", session=Session(), options=KINDS[kind], size=SIZE)
    given = ["-o", ",".join(f"{k}={v}" for k, v in KINDS[kind].items())] if KINDS[kind] else []
    run("qemu-img", "create", "-q", "-f", "qed", *given, theirs, SIZE)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("value", [0x1001, 0x5000000, 0x3000])
@pytest.mark.parametrize("fix", [[], ["-r", "leaks"]])
def test_checks_agree(tmp_path: Path, value: int, fix: list[str]) -> None:
    image = tmp_path / "image.qed"
    run("qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=2", image, SIZE)
    run("qemu-io", "-f", "qed", "-c", "write 0 32k", "-c", "write 3M 4k", image)
    data = bytearray(image.read_bytes())
    table = struct.unpack_from("<Q", data, struct.unpack_from("<Q", data, 40)[0])[0]
    struct.pack_into("<Q", data, table + 8, value)
    image.write_bytes(data)
    ours = tmp_path / "ours.qed"
    ours.write_bytes(data)
    command = ["qemu-img", "check", "-f", "qed", "--output=json", *fix, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    theirs = json.loads(done.stdout)
    with opened(ours, "qed", writable=bool(fix), check=True) as disk:
        qed = driver("qed")
        found = qed.check(disk.node, Fix(leaks=bool(fix)), lambda line: None)
        fixed = found.corruptions_fixed
        if fixed:
            found = qed.check(disk.node, Fix(), lambda line: None)
    assert theirs.get("corruptions", 0) == found.corruptions
    assert theirs.get("corruptions-fixed", 0) == fixed
    assert theirs.get("leaks", 0) == found.leaks
    assert theirs.get("allocated-clusters", 0) == found.allocated_clusters
    assert theirs.get("fragmented-clusters", 0) == found.fragmented_clusters
    assert theirs["total-clusters"] == found.total_clusters


def test_repaired_images_satisfy_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image.qed"
    create_image(str(image), "qed", session=Session(), size=SIZE)
    content = bytearray(SIZE)
    exercise(image, "qed", content, random.Random(1))
    data = bytearray(image.read_bytes())
    data[16] |= 2
    image.write_bytes(bytes(data) + b"x" * 200_000)
    run("qemu-img", "check", "-f", "qed", image, status=3)
    # Opening it for writing is what repairs it.
    with opened(image, "qed") as disk:
        disk.write(0, b"x")
    content[0] = ord("x")
    same(image, "qed", content)
    sound(image, "qed")
    assert image.read_bytes()[16] == 0
