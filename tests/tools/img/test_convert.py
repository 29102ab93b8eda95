"""``convert``: the same images come out as with QEMU's tool."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import assert_twins_are_equal, make_twins
from .conftest import LaminaImg, Outcome

pytestmark = pytest.mark.peer

COMMANDS = [
    "convert -O raw top.qcow2 out.raw",
    "convert -O qcow2 top.qcow2 out.qcow2",
    "convert -O qcow2 -o compat=0.10,cluster_size=4k top.qcow2 out.qcow2",
    "convert -O qcow2 -o cluster_size=2M top.qcow2 out.qcow2",
    "convert -O qcow2 -o preallocation=falloc top.qcow2 out.qcow2",
    "convert -O raw -o preallocation=full top.qcow2 out.raw",
    "convert -c -O qcow2 top.qcow2 out.qcow2",
    "convert -c -W -m 3 -O qcow2 -o compression_type=zstd,cluster_size=4k top.qcow2 out.qcow2",
    "convert -S 0 -O qcow2 top.qcow2 out.qcow2",
    "convert -S 0 -O raw top.qcow2 out.raw",
    "convert -S 0 -c -O qcow2 base.qcow2 out.qcow2",
    "convert -S 512 -O qcow2 -o cluster_size=512 top.qcow2 out.qcow2",
    "convert -S 128k -O raw top.qcow2 out.raw",
    "convert -C -O raw top.qcow2 out.raw",
    "convert -C -O qcow2 top.qcow2 out.qcow2",
    "convert --salvage -O qcow2 top.qcow2 out.qcow2",
    "convert -r 100M -O qcow2 top.qcow2 out.qcow2",
    "convert -O qcow2 top.qcow2 raw.raw other.qcow2 out.qcow2",
    "convert -c -O qcow2 base.qcow2 raw.raw out.qcow2",
    "convert -O qcow2 -B middle.qcow2 -F qcow2 top.qcow2 out.qcow2",
    "convert -c -O qcow2 -o backing_file=middle.qcow2,backing_fmt=qcow2 top.qcow2 out.qcow2",
    "convert -O qcow2 -B other.qcow2 -F qcow2 raw.raw out.qcow2",
    "convert -n -O qcow2 top.qcow2 other.qcow2",
    "convert -n -O raw base.qcow2 raw.raw",
    "convert -n --target-is-zero -O raw base.qcow2 raw.raw",
    "convert -n --target-image-opts base.qcow2 driver=qcow2,file.filename=other.qcow2",
    "convert -U -T none -t none --image-opts driver=qcow2,file.filename=top.qcow2 out.raw",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_image_comes_out(
    command: str,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run(*command.split())
    assert ours == theirs == Outcome(0, "", "")
    found = re.findall(r"[\w.]+$", command.replace("file.filename=", " "))[0]
    assert_twins_are_equal(twins, found)


def test_progress_goes_by_the_data(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run("convert", "-p", "-O", "raw", "raw.raw", "out.raw")
    assert ours.stdout.startswith("    (0.00/100%)\r")
    assert ours.stdout.endswith("    (100.00/100%)\r\n")
    assert ours.stderr == theirs.stderr
    assert twins.run("convert", "-p", "-q", "-O", "raw", "raw.raw", "out.raw")[0].stdout == ""


def test_a_file_in_use_is_not_overwritten(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    before = (twins.ours / "raw.raw").read_bytes()
    ours, theirs = twins.run("convert", "-f", "raw", "-O", "raw", "raw.raw", "raw.raw")
    assert ours == theirs
    assert ours.code == 1
    assert (twins.ours / "raw.raw").read_bytes() == before


FAILING = (
    "json:{{'driver':'blkdebug','image':{{'driver':'qcow2','file':"
    "{{'driver':'file','filename':'base.qcow2'}}}},'inject-error':"
    "[{{'event':'none','iotype':'{}','errno':5,'sector':130}}]}}"
)


@pytest.mark.parametrize("salvage", [(), ("--salvage",), ("--salvage", "-q")])
@pytest.mark.parametrize("iotype", ["read", "block-status"])
def test_a_source_that_fails(
    iotype: str,
    salvage: tuple[str, ...],
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run("convert", *salvage, FAILING.format(iotype), "out.raw")
    assert ours == theirs
    if salvage:
        assert ours.code == 0
        assert_twins_are_equal(twins, "out.raw")


def test_a_target_that_fails_names_the_place(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    target = (
        "driver=blkdebug,image.driver=qcow2,image.file.driver=file,"
        "image.file.filename=other.qcow2,inject-error.0.event=none,"
        "inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.sector=3000"
    )
    ours, theirs = twins.run("convert", "-n", "--target-image-opts", "top.qcow2", target)
    assert ours == theirs
    assert ours.stderr.endswith("No space left on device\n")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_signal_asks_for_the_progress(tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    source.write_bytes(os.urandom(4 << 20))
    command = [
        sys.executable,
        "-c",
        "from lamina.tools.img import main; main()",
        *("convert", "-r", "2M", "-f", "raw", "-O", "raw", str(source), str(tmp_path / "b")),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        deadline = time.monotonic() + 30
        while not (tmp_path / "b").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        said = job.stderr.readline()
        job.kill()
    assert re.fullmatch(r"    \(\d+\.\d\d/100%\)\n", said)
