"""A small backing chain that QEMU makes, in two copies: one for our tool, one for QEMU's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .conftest import LaminaImg, Outcome, qemu_img

IMAGES = ("base.qcow2", "middle.qcow2", "top.qcow2", "other.qcow2", "raw.raw")


class Twins(NamedTuple):
    ours: Path
    theirs: Path
    run: Callable[..., tuple[Outcome, Outcome]]
    """Runs a command line in both; what ours and theirs answered."""


def make_chain(folder: Path) -> None:
    folder.mkdir()

    def img(*words: str) -> None:
        subprocess.run(["qemu-img", *words], cwd=folder, check=True, capture_output=True)

    def io(image: str, *commands: str) -> None:
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(
            ["qemu-io", *words, image], cwd=folder, check=True, capture_output=True
        )

    img("create", "-f", "qcow2", "base.qcow2", "1M")
    io("base.qcow2", "write -P 1 0 256k", "write -P 2 300k 4k", "write -P 0 512k 64k")
    img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "middle.qcow2", "2M")
    io("middle.qcow2", "write -P 3 64k 64k", "write -z 128k 64k", "write -P 4 1500k 100k")
    img("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "3M")
    io("top.qcow2", "write -P 5 192k 64k", "write -z 0 64k", "write -P 6 2500k 100k")
    img("create", "-f", "qcow2", "other.qcow2", "4M")
    io("other.qcow2", "write -P 1 0 100k", "write -P 7 600k 100k", "write -P 9 3500k 4k")
    img("convert", "-O", "raw", "middle.qcow2", "raw.raw")


def make_twins(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> Twins:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_chain(theirs)
    make_chain(ours)

    def run(*arguments: str) -> tuple[Outcome, Outcome]:
        in_folder(theirs)
        expected = qemu_img(*arguments)
        in_folder(ours)
        return lamina_img(*arguments), expected

    return Twins(ours, theirs, run)


def allocation(image: Path) -> list[dict[str, Any]]:
    """What QEMU's map says, without the places, nor which data lies in holes of the file."""
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", str(image)], check=True, capture_output=True
    )
    rows: list[dict[str, Any]] = []
    for row in json.loads(done.stdout):
        row.pop("offset", None)
        row.pop("filename", None)
        row["zero"] = row["zero"] and not row["data"]
        facts = {key: value for key, value in row.items() if key not in ("start", "length")}
        if rows and {k: v for k, v in rows[-1].items() if k not in ("start", "length")} == facts:
            rows[-1]["length"] += row["length"]
        else:
            rows.append(row)
    return rows


def content(image: Path) -> bytes:
    raw = image.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    return raw.read_bytes()


def assert_twins_are_equal(twins: Twins, *images: str) -> None:
    for image in images:
        ours, theirs = twins.ours / image, twins.theirs / image
        assert allocation(ours) == allocation(theirs), image
        assert content(ours) == content(theirs), image
        if image.endswith(".qcow2"):
            assert qemu_img("check", str(ours)).code == 0, image
