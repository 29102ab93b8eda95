"""How the tools end: messages, exit codes, pipes that close, interrupts; and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.errors import StorageError, UsageError
from lamina.tools.arguments import GetoptError, WrongUsage
from lamina.tools.output import to_json, tree_lines
from lamina.tools.progress import Progress
from lamina.tools.tool import Exit, Tool


def ending(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    tool = Tool("/usr/bin/qemu-img")

    def work(_arguments: list[str], tool: Tool) -> int:
        tool.command = "info"
        if error is not None:
            raise error
        return 5

    return tool.run(work, []), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, 5, ""),
        (Exit(3), 3, ""),
        (UsageError("No", hint="Try yes"), 1, "qemu-img: No\nTry yes\n"),
        (WrongUsage("No"), 1, "qemu-img: No\nTry 'qemu-img info --help' for more info\n"),
        (GetoptError("no"), 1, "qemu-img info: no\nTry 'qemu-img info --help' for more info\n"),
        (StorageError.from_errno(5), 1, "qemu-img: Input/output error\n"),
        (OSError(28, os.strerror(28)), 1, "qemu-img: No space left on device\n"),
        (MemoryError(), 1, "qemu-img: Cannot allocate memory\n"),
    ],
)
def test_endings(
    error: BaseException | None, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(error, capsys) == (code, text)


def test_warnings_carry_the_name_and_findings_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = Tool("/bin/lamina-img")
    tool.warn("careful")
    tool.warn("warning: careful")
    for text in ("warning: careful", "error: lost", "WARNING: very", "qcow2: Image is corrupt"):
        tool.session.warn(text)
    careful = "lamina-img: warning: careful\n"
    assert capsys.readouterr().err == (
        3 * careful + "lamina-img: lost\nWARNING: very\nqcow2: Image is corrupt\n"
    )


def start(*arguments: str, **how: object) -> subprocess.Popen[bytes]:
    script = "import sys; from lamina.tools.img import main; sys.argv[0] = 'lamina-img'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, **how  # type: ignore[call-overload]
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    image = tmp_path / "x.raw"
    with open(image, "wb") as file:
        for offset in range(0, 32 << 20, 8192):
            file.seek(offset)
            file.write(b"x" * 4096)
    reading, writing = os.pipe()
    os.close(reading)
    process = start("map", "-f", "raw", "--output", "json", str(image), stdout=writing)
    os.close(writing)
    _, stderr = process.communicate()
    assert stderr == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(512))
    with open("/dev/full", "wb") as full:
        process = start("info", str(tmp_path / "x.raw"), stdout=full)
        _, stderr = process.communicate()
    assert stderr == b"lamina-img: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_kills_as_it_should() -> None:
    script = (
        "from lamina.tools.tool import run_and_leave\n"
        "def work(arguments, tool):\n"
        "    print('ready', flush=True)\n"
        "    import time; time.sleep(60)\n"
        "run_and_leave(work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert stderr == b""
    assert process.returncode == -signal.SIGINT


def test_json_is_json_in_qemus_manner() -> None:
    value = {
        "text": 'a"\\\t\x01\x7fé😀\udcff',
        "none": None,
        "flags": [True, False],
        "empty": {},
        "nothing": [],
        "deep": [{"a": -1}],
    }
    text = to_json(value)
    assert json.loads(text) == value | {"text": 'a"\\\t\x01\x7fé😀\ufffd'}
    assert '"a\\"\\\\\\t\\u0001\\u007F\\u00E9\\uD83D\\uDE00\\uFFFD"' in text
    assert '    "empty": {\n    },\n    "nothing": [\n    ],\n' in text


def test_trees() -> None:
    value = {"a-b": 1, "on": True, "list": [{"x": "y"}, 2], "in-side": {"c": False}}
    assert "\n".join(tree_lines(value, "  ")) == (
        "  a b: 1\n  on: true\n  list:\n      [0]:\n          x: y\n      [1]: 2\n"
        "  in side:\n      c: false"
    )


def test_progress_as_scripts_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(wanted=True) as progress:
        for done in (0.004, 0.5, 0.501, 1.0):
            progress(done)
    figures = (0, 50, 100, 100)
    expected = "".join(f"    ({figure:.2f}/100%)\r" for figure in figures) + "\n"
    assert capsys.readouterr().out == expected


def test_progress_may_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(wanted=True, quiet=True) as progress:
        progress(0.5)
    with Progress() as progress:
        progress(0.5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_progress_answers_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Progress() as progress:
        progress(0.25)
        signal.raise_signal(signal.SIGUSR1)
    assert capsys.readouterr().err == "    (25.00/100%)\n"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar() -> None:
    import pty

    script = (
        "import time\n"
        "from lamina.tools import progress\n"
        "progress._BAR_DELAY = 0\n"
        "with progress.Progress() as report: report(0.5)\n"
        "print('done')\n"
    )
    master, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=terminal, check=True
    )
    os.close(terminal)
    shown = os.read(master, 1000).decode()
    os.close(master)
    assert " 50% [###############...............]" in shown
    assert shown.endswith("\r\033[K"), "the bar is gone in the end"
    assert done.stdout == b"done\n"
