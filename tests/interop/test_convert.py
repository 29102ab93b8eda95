"""Conversions in both directions, with many options: QEMU finds the images equal and sound."""

from __future__ import annotations

import itertools
import random
import subprocess
from pathlib import Path

import pytest

from lamina.tools import img
from lamina.tools.tool import Tool

pytestmark = pytest.mark.peer

SIZE = 5 * (1 << 20) + 512


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def qemu_img(*words: str) -> str:
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def lamina_img(*words: str) -> None:
    assert Tool("lamina-img").run(img.run, list(words)) == 0


def random_raw(seed: int) -> None:
    """Data, zeroes that are data, and holes, in pieces that respect no cluster."""
    chance = random.Random(seed)
    with open("source.raw", "wb") as file:
        file.truncate(SIZE)
        at = 0
        while at < SIZE:
            length = min(chance.choice((1, 3, 8, 100, 1000)) * 512, SIZE - at)
            kind = chance.random()
            if kind < 0.6:
                file.seek(at)
                file.write(chance.randbytes(length) if kind < 0.4 else bytes(length))
            at += length


QCOW2 = [
    ",".join(choice)
    for choice in itertools.product(
        ("cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M"),
        ("compat=0.10", "compression_type=zstd", "refcount_bits=1"),
    )
]
FLAGS = [(), ("-c",), ("-S", "0"), ("-S", "512"), ("-m", "1"), ("-C",), ("-W", "-S", "64k")]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("number", range(len(QCOW2)))
def test_there_and_back(number: int, seed: int) -> None:
    options = QCOW2[number]
    flags = FLAGS[(number + 5 * seed) % len(FLAGS)]
    random_raw(seed)
    ours = ["convert", *flags, "-f", "raw", "-O", "qcow2", "-o", options]
    lamina_img(*ours, "source.raw", "ours.qcow2")
    assert "No errors were found" in qemu_img("check", "ours.qcow2")
    assert "identical" in qemu_img("compare", "-f", "raw", "source.raw", "ours.qcow2")
    lamina_img("convert", "-O", "raw", "ours.qcow2", "back.raw")
    assert Path("back.raw").read_bytes() == Path("source.raw").read_bytes()

    theirs = [flag for flag in flags if flag != "-C"]
    command = ["convert", *theirs, "-f", "raw", "-O", "qcow2", "-o", options]
    qemu_img(*command, "source.raw", "theirs.qcow2")
    lamina_img("convert", "-O", "raw", "theirs.qcow2", "back.raw")
    assert Path("back.raw").read_bytes() == Path("source.raw").read_bytes()
    lamina_img("compare", "-q", "theirs.qcow2", "ours.qcow2")
    again = FLAGS[(number + seed) % len(FLAGS)]
    lamina_img("convert", *again, "-O", "qcow2", "theirs.qcow2", "again.qcow2")
    assert "No errors were found" in qemu_img("check", "again.qcow2")
    assert "identical" in qemu_img("compare", "theirs.qcow2", "again.qcow2")


@pytest.mark.parametrize("seed", range(3))
def test_chains(seed: int) -> None:
    """Overlays by QEMU, written to by QEMU, flattened, committed and rebased by us."""
    chance = random.Random(seed)
    random_raw(seed)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "source.raw", "base.qcow2")
    below = "base.qcow2"
    for name in ("one.qcow2", "two.qcow2"):
        size = str(SIZE + chance.randint(-100, 100) * 4096)
        cluster = chance.choice(("4k", "64k"))
        create = ["create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}"]
        qemu_img(*create, "-b", below, "-F", "qcow2", name, size)
        for _ in range(8):
            offset = chance.randrange(0, int(size) - 300 * 512, 512)
            length = chance.randint(1, 300) * 512
            what = chance.choice(("write -P 7", "write -z", "discard"))
            command = f"{what} {offset} {length}"
            subprocess.run(["qemu-io", "-c", command, name], check=True, capture_output=True)
        below = name
    qemu_img("convert", "-O", "raw", "two.qcow2", "expected.raw")

    lamina_img("convert", "-O", "raw", "two.qcow2", "flat.raw")
    assert Path("flat.raw").read_bytes() == Path("expected.raw").read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", str(SIZE // 2))
    lamina_img("rebase", "-b", "other.qcow2", "-F", "qcow2", "two.qcow2")
    assert "No errors were found" in qemu_img("check", "two.qcow2")
    qemu_img("convert", "-O", "raw", "two.qcow2", "rebased.raw")
    assert Path("rebased.raw").read_bytes() == Path("expected.raw").read_bytes()

    qemu_img("rebase", "-b", "one.qcow2", "-F", "qcow2", "two.qcow2")
    lamina_img("commit", "-q", "two.qcow2")
    for name in ("one.qcow2", "two.qcow2"):
        assert "No errors were found" in qemu_img("check", name)
    qemu_img("convert", "-O", "raw", "two.qcow2", "committed.raw")
    assert Path("committed.raw").read_bytes() == Path("expected.raw").read_bytes()
