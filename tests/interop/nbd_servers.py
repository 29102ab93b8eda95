"""NBD servers as processes, ours and others, and their disks."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.session import Session

Server = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]
SIZE = 4 << 20
BIN = Path(sys.executable).parent
LIBNBD_PYTHON = "/usr/bin/python3"
"""The interpreter that has libnbd's module, where there is one."""
needs_nbdsh = pytest.mark.skipif(
    not Path("/usr/lib/python3/dist-packages/nbdsh.py").exists(), reason="needs python3-libnbd"
)
needs_libnbd = pytest.mark.skipif(shutil.which("nbdinfo") is None, reason="needs libnbd-bin")
needs_nbdkit = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")


def run(*command: object, check: bool = True) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def process(path: Path, *command: object) -> Iterator[subprocess.Popen[str]]:
    """A server that listens on the socket ``path``, until the end of the block."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 20
            while not path.exists():
                assert server.poll() is None, server.stderr and server.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            _wait_until_it_listens(path)
            yield server
        finally:
            _end(server, patient="qemu-nbd" in words[0])


def _end(server: subprocess.Popen[str], *, patient: bool) -> None:
    """``patient``: qemu-nbd misses a signal that comes while a handshake is failing; it is told
    again."""
    for _ in range(4 if patient else 1):
        if server.poll() is None:
            server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(5 if patient else 20)
            return
    server.kill()
    server.wait()
    raise AssertionError(f"{server.args!r} does not end")


@contextmanager
def qemu_nbd(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    with process(
        path, "qemu-nbd", "-k", path, "-t", "-e", 8, "-x", "disk", *arguments
    ) as server:
        yield server


@contextmanager
def nbdkit(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    with process(
        path, "nbdkit", "-f", "-U", path, "--exportname", "disk", *arguments
    ) as server:
        yield server


def _wait_until_it_listens(path: Path) -> None:
    """Servers make their sockets a moment before they listen."""
    deadline = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(path))
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def lamina_nbd(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    tool = BIN / "lamina-nbd"
    with process(path, tool, "-k", path, "-t", "-e", 8, "-x", "disk", *arguments) as server:
        yield server


SERVERS = [pytest.param(lamina_nbd, id="lamina-nbd"), pytest.param(qemu_nbd, id="qemu-nbd")]
"""Ours, and the one whose place it takes."""


def url(path: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={path}"


def opened(socket: Path, *, writable: bool = True) -> Backend:
    """The export of a server, with our client."""
    return Backend.open(
        url(socket), session=Session(), format="raw", writable=writable, discard="unmap"
    )


# -- their disks ---------------------------------------------------------------------------------


def image(path: Path, format: str, content: bytes | None = None, *, size: int = SIZE) -> Path:
    """One in the folder, empty but for ``content``."""
    disk = path / f"disk.{format}"
    run("qemu-img", "create", "-q", "-f", format, disk, size)
    if content is not None:
        plain = path / "content"
        plain.write_bytes(content)
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", format, plain, disk)
    return disk


def content_of(disk: Path, format: str) -> bytes:
    plain = disk.with_name(f"{disk.name}.content")
    run("qemu-img", "convert", "-f", format, "-O", "raw", disk, plain)
    return plain.read_bytes()


def assert_consistent(disk: Path, *, leaks: bool) -> None:
    """``leaks``: clusters that nobody refers to are allowed; a crash may leave nothing else."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", disk], capture_output=True, text=True
    )
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr
