"""NBD servers as processes, ours and others."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 4 << 20
BIN = Path(sys.executable).parent


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
            if server.poll() is None:
                server.terminate()
            server.wait(20)


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


def url(path: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={path}"
