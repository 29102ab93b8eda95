"""Both tools on the same command lines: ours in this process, QEMU's as it is installed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lamina.tools import img
from lamina.tools.tool import Tool

QEMU_IMG = shutil.which("qemu-img")
QEMU_IO = shutil.which("qemu-io")


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


LaminaImg = Callable[..., Outcome]


@pytest.fixture
def lamina_img(capfd: pytest.CaptureFixture[str]) -> LaminaImg:
    """Runs a command line as if it had been called ``qemu-img``."""

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = Tool("/usr/local/bin/qemu-img").run(img.run, list(arguments))
        return Outcome(code, *capfd.readouterr())

    return run


def qemu_img(*arguments: str) -> Outcome:
    done = subprocess.run(
        ["qemu-img", *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    return Outcome(
        done.returncode,
        done.stdout.decode(errors="surrogateescape"),
        done.stderr.decode(errors="surrogateescape"),
    )


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that QEMU made: whole ones, odd ones and broken ones."""
    if QEMU_IMG is None or QEMU_IO is None:
        pytest.skip("needs qemu-img and qemu-io")
    folder = tmp_path_factory.mktemp("gallery")
    before = Path.cwd()
    os.chdir(folder)
    try:
        _make_whole_images()
        _make_other_formats()
        _make_broken_images()
    finally:
        os.chdir(before)
    return folder


def _img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


def _io(file: str, *commands: str, format: str = "qcow2") -> None:
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", format, *options, file], check=True, capture_output=True)


def _make_whole_images() -> None:
    _img("create", "-f", "qcow2", "base.qcow2", "1M")
    _img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "2M")
    _img("create", "r.raw", "3M")
    _io("base.qcow2", "write 64k 64k")
    _io("top.qcow2", "write 128k 200k", "write -z 1M 128k")
    _io("r.raw", "write 1M 100k", format="raw")
    shutil.copy("r.raw", 'a"b é.raw')
    _img("convert", "-c", "-O", "qcow2", "top.qcow2", "c.qcow2")
    _img("create", "-f", "qcow2", "-o", "preallocation=metadata", "pm.qcow2", "1M")
    _img("create", "-f", "qcow2", "-o", "preallocation=metadata", "pm2.qcow2", "1M")
    _io("pm2.qcow2", "write -z 64k 64k", "write 128k 64k", "discard 128k 64k")
    Path("e.raw").touch()
    Path("empty").touch()
    inner = 'json:{"driver":"raw","file.filename":"r.raw"}'
    _img("create", "-f", "qcow2", "-b", inner, "-F", "raw", "j.qcow2")
    _img("create", "-f", "qcow2", "-b", 'a"b é.raw', "-F", "raw", "k.qcow2")
    Path("sub").mkdir()
    _img("create", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", "sub/top.qcow2")
    _img("create", "-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "1M")
    _img("snapshot", "-c", "s1", "v2.qcow2")
    _img("snapshot", "-c", "a long name for a snapshot", "v2.qcow2")
    odd = "lazy_refcounts=on,cluster_size=4k,refcount_bits=1,compression_type=zstd"
    _img("create", "-f", "qcow2", "-o", odd, "odd.qcow2", "100M")
    _img("create", "-f", "qcow2", "bm.qcow2", "1M")
    _img("bitmap", "--add", "bm.qcow2", "b0")
    _img("bitmap", "--add", "-g", "4k", "--disable", "bm.qcow2", "b1")
    _io("bm.qcow2", "write 64k 100k")


def _make_other_formats() -> None:
    _img("create", "-f", "qed", "-b", "r.raw", "-F", "raw", "top.qed")
    _io("top.qed", "write 64k 64k", "write -z 1M 128k", "write 128k 64k", format="qed")
    for format in ("vdi", "vpc"):
        _img("create", "-f", format, f"dynamic.{format}", "7M")
        _io(f"dynamic.{format}", "write 4M 2M", "write 0 2M", format=format)
    _img("create", "-f", "vdi", "-o", "static=on", "static.vdi", "2M")
    _img("create", "-f", "vpc", "-o", "subformat=fixed", "fixed.vpc", "2M")
    damaged = bytearray(Path("dynamic.vdi").read_bytes())
    damaged[0x200:0x204] = struct.pack("<I", 77)
    Path("damaged.vdi").write_bytes(damaged)


def _make_broken_images() -> None:
    _img("create", "-f", "qcow2", "-u", "-b", "nope", "-F", "raw", "on.qcow2", "1M")
    _img("create", "-f", "qcow2", "l1.qcow2", "1M")
    _img("create", "-f", "qcow2", "-b", "l1.qcow2", "-F", "qcow2", "l2.qcow2")
    _img("rebase", "-u", "-b", "l2.qcow2", "-F", "qcow2", "l1.qcow2")
    _patched("top.qcow2", "dirty.qcow2", (79, b"\x01"))
    _patched("top.qcow2", "corrupt.qcow2", (79, b"\x02"))
    # In an image made by QEMU: refcount block in cluster 2, L2 table in 4, data in 5.
    cluster = 1 << 16
    leak = (2 * cluster + 2 * 7, struct.pack(">H", 1))
    _patched("base.qcow2", "leak.qcow2", leak, size=8 * cluster)
    _patched("leak.qcow2", "lost.qcow2", (2 * cluster + 2 * 5, struct.pack(">H", 0)))
    _patched("leak.qcow2", "far.qcow2", (4 * cluster, struct.pack(">Q", 1 << 63 | 1 << 40)))
    # The extension that names the bitmap directory ends at byte 536.
    header = Path("bm.qcow2").read_bytes()[:536]
    directory = int.from_bytes(header[-8:], "big")
    _patched("bm.qcow2", "inuse.qcow2", (directory + 15, b"\x03"))
    _patched("bm.qcow2", "type.qcow2", (directory + 16, b"\x02"))


def _patched(source: str, target: str, patch: tuple[int, bytes], size: int = 0) -> None:
    content = bytearray(Path(source).read_bytes())
    content.extend(bytes(max(size - len(content), 0)))
    offset, data = patch
    content[offset : offset + len(data)] = data
    Path(target).write_bytes(content)


@pytest.fixture
def in_folder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Change to a folder until the end of the test."""
    return lambda folder: monkeypatch.chdir(folder)
