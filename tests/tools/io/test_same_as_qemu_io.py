"""Both tools are told the same: they say the same, end the same, and leave the same image."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.session import Session
from lamina.tools.io.start import run
from lamina.tools.tool import Tool

from . import cases

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io"),
]

Outcome = tuple[int, str, str]


def theirs(arguments: list[str], stdin: str) -> Outcome:
    done = subprocess.run(
        ["qemu-io", *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def ours(arguments: list[str], stdin: str) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = Tool("qemu-io").run(run, arguments)
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


def comparable(text: str) -> str:
    """Without times, without prose, without names of this machine's files and of other tools."""
    text = re.sub(r"ops; .* ops/sec\)", "ops; …", text)
    text = re.sub(r",\d+:\d\d:\d\d\.\d\d,[\d.]+,[\d.]+", ",…", text)
    text = re.sub(r"Usage: .*", "Usage", text, flags=re.DOTALL)
    text = re.sub(r"(qemu-io version [\d.]+) .*", r"\1", text, flags=re.DOTALL)
    return re.sub(r"^(?!Parsing)(.*) -- (?!').*", r"\1", text, flags=re.MULTILINE)


class Pair:
    """Two directories with the same image, one for each tool."""

    def __init__(self, home: Path, image: Path, format: str) -> None:
        self.home = home
        self.image = image
        self.format = format
        self.differences: list[str] = []

    def compare(self, arguments: list[str], stdin: str = "", *, prompts: bool = True) -> None:
        outcomes = []
        for tool in (theirs, ours):
            place = self.home / tool.__name__
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            shutil.copy(self.image, place / "disk")
            (place / "pattern").write_bytes(bytes(range(256)) * 3)
            with contextlib.chdir(place):
                code, out, err = tool(arguments, stdin)
            out, err = comparable(out), comparable(err)
            if not prompts:
                out = out.replace("qemu-io> ", "")
            outcomes.append([*out.split("\n"), "-- errors", *err.split("\n"), f"-- code {code}"])
        if self.guest("theirs") != self.guest("ours"):
            outcomes[1].append("-- another content of the disk")
        if outcomes[0] != outcomes[1]:
            told = f"qemu-io {shlex.join(arguments)} <<< {stdin!r}"
            self.differences += [told, *difflib.unified_diff(*outcomes, lineterm="", n=1)]

    def guest(self, tool: str) -> bytes:
        """What the disk holds, up to 16 MiB."""
        name = str(self.home / tool / "disk")
        with Backend.open(name, session=Session(), format=self.format) as disk:
            return disk.read(0, min(disk.size, 16 << 20))

    def check(self) -> None:
        assert not self.differences, "\n" + "\n".join(self.differences)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("images")
    made = {}
    for format in ("raw", "qcow2"):
        made[format] = home / f"disk.{format}"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", format, made[format], "4M"], check=True
        )
        subprocess.run(
            ["qemu-io", "-f", format, "-c", "write -q -P 7 1M 1M", made[format]], check=True
        )
    return made


@pytest.fixture(params=["raw", "qcow2"])
def pair(request: pytest.FixtureRequest, images: dict[str, Path], tmp_path: Path) -> Pair:
    return Pair(tmp_path, images[request.param], request.param)


@pytest.fixture
def raw_pair(images: dict[str, Path], tmp_path: Path) -> Pair:
    return Pair(tmp_path, images["raw"], "raw")


def lines(text: str) -> list[str]:
    return text.removeprefix("\n").removesuffix("\n").split("\n")


@pytest.mark.parametrize("group", ["READING", "WRITING", "THE_REST"])
def test_single_commands(pair: Pair, group: str) -> None:
    for command in lines(getattr(cases, group)):
        pair.compare(["-f", pair.format, "disk", "-c", command])
    pair.check()


def test_commands_of_one_format(pair: Pair) -> None:
    for command in lines(getattr(cases, f"{pair.format.upper()}_ONLY")):
        pair.compare(["-f", pair.format, "disk", "-c", command])
    pair.check()


@pytest.mark.parametrize("number", range(len(cases.SESSIONS)))
def test_sessions(pair: Pair, number: int) -> None:
    pair.compare(["-f", pair.format, "disk"], cases.SESSIONS[number])
    pair.check()


@pytest.mark.parametrize("number", range(len(cases.SLOW_REQUESTS)))
def test_requests_in_flight(pair: Pair, number: int) -> None:
    pair.compare(["-f", pair.format, "disk"], cases.SLOW_REQUESTS[number], prompts=False)
    pair.check()


def test_images_open_for_reading_only(pair: Pair) -> None:
    session = cases.SESSIONS[3].replace("reopen -r\n", "")
    pair.compare(["-r", "-f", pair.format, "disk"], session)
    pair.check()


def test_starts(raw_pair: Pair) -> None:
    for line in lines(cases.STARTS):
        raw_pair.compare(shlex.split(line))
    raw_pair.check()


def test_probed_raw_images_are_guarded(raw_pair: Pair) -> None:
    raw_pair.compare(["disk"], "write -P 1 0 512\nread -P 1 0 512\nwrite -P 2 4k 4k\n")
    raw_pair.check()
