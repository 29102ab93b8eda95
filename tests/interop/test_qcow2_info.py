"""What ``info`` says of every kind of qcow2 image, beside QEMU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer

START = "import lamina.tools.img, sys; sys.argv[0] = 'qemu-img'; sys.exit(lamina.tools.img.main())"
TOOLS = {"theirs": ["qemu-img"], "ours": [sys.executable, "-c", START]}
SECRET = ["--object", "secret,id=s,data=abc"]

IMAGES: dict[str, list[str]] = {
    "v3": [],
    "v2": ["-o", "compat=0.10"],
    "variants": ["-o", "lazy_refcounts=on,refcount_bits=1,compression_type=zstd"],
    "backed": ["-b", "base.raw", "-F", "raw"],
    "backed v2": ["-o", "compat=0.10", "-b", "base.raw", "-F", "raw"],
    "snapshots": [],
    "bitmaps": [],
    "stale bitmaps": [],
    "data file": ["-o", "data_file=x.data"],
    "raw data file": ["-o", "data_file=y.data,data_file_raw=on"],
    "extended L2": ["-o", "extended_l2=on,cluster_size=16k"],
    "luks": [*SECRET, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"],
    "aes": [*SECRET, "-o", "encrypt.format=aes,encrypt.key-secret=s"],
    "dirty": ["-o", "lazy_refcounts=on"],
    "corrupt": [],
}


def run(*words: str, check: bool = True) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, capture_output=True, text=True, check=check, env=environment)
    return done.stderr + done.stdout


def make(name: str) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "2M")
    run("qemu-img", "create", "-q", "-f", "qcow2", *IMAGES[name], "image", "2M")
    if name == "snapshots":
        run("qemu-img", "snapshot", "-c", "first", "image")
        run("qemu-io", "-c", "write 0 1M", "image")
        run("qemu-img", "snapshot", "-c", "second one", "image")
    elif "bitmaps" in name:
        run("qemu-img", "bitmap", "--add", "image", "b0")
        run("qemu-img", "bitmap", "--add", "-g", "4k", "--disable", "image", "b1")
        if name == "stale bitmaps":
            poke(88, bytes(8))
    elif name == "dirty":
        run("qemu-io", "-c", "write 0 1M", "-c", "abort", "image", check=False)
    elif name == "corrupt":
        poke(72, (2).to_bytes(8, "big"))


def poke(offset: int, data: bytes) -> None:
    with Path("image").open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("name", IMAGES)
def test_as_qemu_tells_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(name)
    human = {tool: run(*words, "info", "image") for tool, words in TOOLS.items()}
    # QEMU ends its warning about bitmaps without a line end.
    theirs = human["theirs"].replace("to fix.image:", "to fix.\nimage:")
    assert human["ours"] == theirs
    told = {
        tool: run(*words, "info", "--output=json", "image") for tool, words in TOOLS.items()
    }
    data = {tool: json.loads(text[text.index("{") :]) for tool, text in told.items()}
    assert data["ours"] == data["theirs"]
