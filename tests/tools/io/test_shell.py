"""The loop around the commands, and requests that go on while it turns."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.session import Session
from lamina.tools.io import terminal
from lamina.tools.io.aio import InFlight
from lamina.tools.io.commands import COMMANDS, CommandFailed, load
from lamina.tools.io.start import run
from lamina.tools.tool import Tool

HEAVY = {
    *("argparse", "asyncio", "concurrent.futures", "cryptography", "dataclasses", "inspect"),
    *("json", "logging", "numpy", "tempfile", "textwrap", "lamina.codecs", "lamina.formats.raw"),
    *("lamina.block.creation", "lamina.tools.io.aio", "lamina.tools.io.manual"),
}

LAMINA_IO = [sys.executable, "-c", "import sys; from lamina.tools.io import main; sys.exit(main())"]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        lines = out.replace("qemu-io> ", "").splitlines()
        self.lines = [line for line in lines if "ops;" not in line]
        self.errors = err.splitlines()


def tell(*arguments: str, stdin: str = "") -> Result:
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = Tool("lamina-io").run(run, arguments)
    finally:
        sys.stdin = before
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def raw(tmp_path: Path) -> str:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return str(path)


@pytest.fixture
def qcow2(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qcow2")
    create_image(path, "qcow2", session=Session(), size=1 << 20)
    return path


# -- the loop --------------------------------------------------------------------------------------


def test_every_command_has_a_function() -> None:
    assert {load(name, command).__name__ for name, command in COMMANDS.items()} <= {
        *(f"run_{name}" for name in COMMANDS),
        "refuse",
    }


def test_every_command_is_explained() -> None:
    for name in COMMANDS:
        assert tell("-c", f"help {name}").lines[0].startswith(name)


def test_a_failure_does_not_stop_the_commands_after_it(raw: str) -> None:
    result = tell("-f", "raw", "-c", "foo", "-c", "length", "-c", "read -P 1 0 512", raw)
    assert result.code == 1
    assert result.lines == [
        "1 MiB",
        "Pattern verification failed at offset 0, 512 bytes",
        "read 512/512 bytes at offset 0",
    ]
    assert result.errors == ['command "foo" not found']


def test_quit_stops_them(raw: str) -> None:
    assert tell("-f", "raw", "-c", "quit", "-c", "foo", raw).code == 0
    assert tell("-f", "raw", raw, stdin="quit\nfoo\n").code == 0


def test_the_prompt_is_what_scripts_wait_for() -> None:
    done = subprocess.run(LAMINA_IO, input="sleep 0\nquit\n", capture_output=True, text=True)
    assert done.stdout == "qemu-io> qemu-io> "


def test_what_a_person_types_is_asked_for_with_the_same_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) == 2:
            raise EOFError
        return "length"

    monkeypatch.setattr("builtins.input", answer)
    assert terminal.ask(sys.stdin) == "length\n"
    assert terminal.ask(sys.stdin) == ""
    assert prompts == ["qemu-io> "] * 2


def test_names_are_completed() -> None:
    found = [terminal._complete("aio", number) for number in range(4)]
    assert found == ["aio_flush ", "aio_read ", "aio_write ", None]


def test_signals_end_the_process_but_lose_nothing(raw: str) -> None:
    arguments = [*LAMINA_IO, "-f", "raw", "-c", "length", raw, "-c"]
    done = subprocess.run([*arguments, "sigraise 9"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1 MiB\n")
    done = subprocess.run([*arguments, "sigraise 2"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "1 MiB\n", "")


def test_abort_loses_what_was_not_written(raw: str) -> None:
    arguments = [*LAMINA_IO, "-f", "raw", "-c", "length", "-c", "abort", raw]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")


def test_errors_overtake_what_is_said_unless_somebody_watches(raw: str) -> None:
    done = subprocess.run(
        [*LAMINA_IO, "-f", "raw", "-c", "length", "-c", "foo", raw],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout == 'command "foo" not found\n1 MiB\n'


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.raw"
    with open(path, "wb") as file:
        file.truncate(512)
    done = subprocess.run(
        [*LAMINA_IO, "-c", b"open -o driver=raw " + path, "-c", "length"], capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"512 bytes\n", b"")


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_odd_buffers_hold_the_same(raw: str, cache: str) -> None:
    commands = ["write -P 5 0 64k", "write -P 6 3 700", "read -P 5 703 1k", "read -P 6 3 700"]
    arguments = [word for command in commands for word in ("-c", command)]
    result = tell("-m", "-t", cache, "-f", "raw", *arguments, raw)
    assert (result.code, result.errors) == (0, [])


def test_a_snapshot_forgets_what_was_written(
    qcow2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = Path(qcow2).read_bytes()
    result = tell("-s", "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", qcow2)
    assert (result.code, result.errors) == (0, [])
    assert Path(qcow2).read_bytes() == before
    assert list(place.iterdir()) == []


def test_a_snapshot_of_a_changed_image_shows_the_image(qcow2: str) -> None:
    tell("-c", "write -P 4 64k 64k", qcow2)
    result = tell("-s", "-c", "read -P 4 64k 64k", "-c", "read -P 0 0 64k", qcow2)
    assert result.code == 0


def test_closing_lets_others_open(qcow2: str) -> None:
    result = tell(qcow2, stdin=f"close\nopen {qcow2}\nwrite 0 512\nclose\nclose\n")
    assert result.lines == ["wrote 512/512 bytes at offset 0"]
    assert result.errors == ["no file open, try 'help open'"]


def test_writing_through_keeps_what_a_crash_would_lose(qcow2: str) -> None:
    command = [*LAMINA_IO, "-t", "writethrough", "-c", "write -P 5 0 64k", "-c", "sigraise 9"]
    assert subprocess.run([*command, qcow2]).returncode == -signal.SIGKILL
    with Backend.open(qcow2, session=Session()) as image:
        assert image.read(0, 1) == b"\5"


def test_little_is_loaded_before_the_first_command(qcow2: str) -> None:
    program = (
        "import sys; sys.argv = ['lamina-io', '-c', 'read 0 512', sys.argv[1]]\n"
        "from lamina.tools.io import main; main(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, qcow2], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "lamina.tools.io.readwrite" in loaded
    assert not loaded & HEAVY


# -- requests in flight ----------------------------------------------------------------------------


def test_reports_come_in_the_order_of_the_ends(capsys: pytest.CaptureFixture[str]) -> None:
    requests, gate = InFlight(), threading.Event()

    def slow() -> str:
        gate.wait()
        return "slow\n"

    requests.start(slow)
    requests.start(lambda: "quick\n")
    while not requests._reports:
        gate.wait(0.001)
    assert not requests.wait(0.001)
    assert capsys.readouterr().out == "quick\n"
    assert not requests.idle
    gate.set()
    assert requests.wait()
    assert capsys.readouterr().out == "slow\n"


def test_nothing_is_printed_amidst_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    requests = InFlight()
    requests.start(lambda: "done\n")
    while not requests.idle:
        pass
    assert capsys.readouterr().out == ""
    requests.report()
    assert capsys.readouterr().out == "done\n"
    with requests.reporting_at_once():
        requests.start(lambda: "at once\n")
        while not requests.idle:
            pass
        assert capsys.readouterr().out == "at once\n"


def test_a_failed_request_is_reported_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise CommandFailed("readv failed: Input/output error")

    requests = InFlight()
    requests.start(fail)
    assert requests.wait()
    assert capsys.readouterr().out == "readv failed: Input/output error\n"


def test_many_requests_at_once(qcow2: str) -> None:
    stdin = "".join(
        f"aio_write -q -P {number} {4 * number}k 4k\n" for number in range(1, 200)
    ) + "aio_flush\n" + "".join(
        f"aio_read -q -P {number} {4 * number}k 4k\n" for number in range(1, 200)
    )
    result = tell(qcow2, stdin=stdin)
    assert (result.code, result.lines, result.errors) == (0, [], [])


# -- breakpoints -----------------------------------------------------------------------------------


def test_a_suspended_request_waits_to_be_resumed(qcow2: str) -> None:
    result = tell(
        f"blkdebug::{qcow2}",
        stdin="break write_aio A\naio_write -P 5 0 64k\nwait_break A\nread -P 0 0 64k\n"
        "resume A\naio_flush\nread -P 5 0 64k\n",
    )
    assert (result.code, result.errors) == (0, [])
    assert result.lines == [
        "blkdebug: Suspended request 'A'",
        "read 65536/65536 bytes at offset 0",
        "blkdebug: Resuming request 'A'",
        "wrote 65536/65536 bytes at offset 0",
        "read 65536/65536 bytes at offset 0",
    ]


@pytest.mark.parametrize("end", ["", "quit\n", "close\n"])
def test_the_end_resumes_what_is_suspended(qcow2: str, end: str) -> None:
    stdin = "break write_aio A\nbreak write_aio B\naio_write 0 64k\nwait_break A\n" + end
    result = tell(f"blkdebug::{qcow2}", stdin=stdin)
    assert result.lines[-1] == "wrote 65536/65536 bytes at offset 0"


def test_nobody_waits_for_what_cannot_happen(qcow2: str) -> None:
    for name, trouble in (
        (qcow2, "Operation not supported"),
        (f"blkdebug::{qcow2}", "No such file or directory"),
    ):
        result = tell("-c", "aio_read -q 0 512", "-c", "wait_break A", name)
        assert result.lines == [f"Could not wait for breakpoint A: {trouble}"]
        assert result.code == 1


def test_unknown_breakpoints(qcow2: str) -> None:
    result = tell(
        f"blkdebug::{qcow2}", stdin="break nonsense A\nresume A\nremove_break A\nbreak pwritev A\n"
        "remove_break A\n",
    )
    assert result.lines == [
        "Could not set breakpoint: No such file or directory",
        "Could not resume request: No such file or directory",
        "Could not remove breakpoint A: No such file or directory",
    ]
