"""Servers and clients that are killed in the middle of things, and what the others make of it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.limits import WriteFlags
from lamina.block.session import Session
from tests.interop.nbd_servers import (
    LIBNBD_PYTHON,
    SERVERS,
    SIZE,
    Server,
    assert_consistent,
    content_of,
    image,
    lamina_nbd,
    needs_nbdsh,
    run,
    url,
)

pytestmark = pytest.mark.peer

BLOCK = 16 << 10

# -- servers that are killed -----------------------------------------------------------------------


class Writers:
    """Threads that overwrite the disk, each its own part, in batches, until they are told to end.

    ``model`` has what was acknowledged."""

    COUNT = 3
    PART = SIZE // 4

    def __init__(self, disk: Backend, flags: WriteFlags) -> None:
        self.model = bytearray(SIZE)
        self.batches = 0
        self._disk = disk
        self._flags = flags
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(self.COUNT)
        self._running = [self._pool.submit(self._write, part) for part in range(self.COUNT)]

    def _write(self, part: int) -> None:
        dice = random.Random(part)
        blocks = range(part * self.PART, (part + 1) * self.PART, BLOCK)
        while not self._end.is_set():
            batch = [(at, dice.randbytes(BLOCK)) for at in dice.sample(blocks, 8)]
            self._disk.writev(batch, self._flags)
            for at, data in batch:
                self.model[at : at + BLOCK] = data
            self.batches += 1
            time.sleep(0.005)

    def wait_for_progress(self) -> None:
        deadline, goal = time.monotonic() + 30, self.batches + 10
        while self.batches < goal:
            for writer in self._running:
                assert not writer.done(), writer.exception()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def assert_held(self) -> None:
        """Nothing is written any more, once the replies are in that were on their way; and nobody
        fails."""
        deadline, before = time.monotonic() + 30, -1
        while self.batches != before:
            assert time.monotonic() < deadline
            before = self.batches
            time.sleep(0.2)
        assert not any(writer.done() for writer in self._running)

    def end(self) -> None:
        self._end.set()
        for writer in self._running:
            writer.result(30)

    def close(self) -> None:
        self._end.set()
        self._pool.shutdown()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("server", SERVERS)
def test_writes_outlive_their_server(tmp_path: Path, server: Server, format: str) -> None:
    """Each time it is killed, the client holds what it has, and sends it again to the next one.

    What a raw image was told is in the host's cache and survives the process. In qcow2 only what is
    on stable storage survives, so every write says FUA there."""
    disk, socket = image(tmp_path, format), tmp_path / "socket"
    flags = WriteFlags.NONE if format == "raw" else WriteFlags.FUA
    with ExitStack() as stack:
        writers: Writers | None = None
        for frozen in (False, True):
            with server(socket, "-f", format, disk) as running:
                if writers is None:
                    options = {
                        "driver": "nbd",
                        "server.type": "unix",
                        "server.path": str(socket),
                        "export": "disk",
                        "reconnect-delay": "30",
                    }
                    backend = Backend.open(options, session=Session(), writable=True)
                    writers = Writers(stack.enter_context(backend), flags)
                    stack.callback(writers.close)
                writers.wait_for_progress()
                if frozen:  # there are requests that it has not even read
                    running.send_signal(signal.SIGSTOP)
                    writers.assert_held()
                running.kill()
                running.wait()
                writers.assert_held()
            if format == "qcow2":
                assert_consistent(disk, leaks=True)
        assert writers is not None
        with server(socket, "-f", format, disk):
            writers.wait_for_progress()
            writers.end()
            assert backend.read(0, SIZE) == writers.model
            stack.close()
    assert content_of(disk, format) == writers.model


# -- clients that are killed -----------------------------------------------------------------------

FLUSHED = 8
"""Blocks of 64 KiB at the start, each of its own number plus one, that are flushed; from 1 MiB on
there is a megabyte and more of 0x77 on the way when the client is killed."""

LIBNBD_IS_KILLED = f"""
import nbd, os, signal, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for n in range({FLUSHED}):
    h.pwrite(bytes([n + 1]) * 65536, n * 65536)
h.flush()
for n in range(4, 16):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([0x77]) * 262144), n * 262144)
os.kill(os.getpid(), signal.SIGKILL)  # more than fits the socket: one of them is half sent
"""
LAMINA_IS_KILLED = f"""
import os, signal, sys, threading
from lamina.block.backend import Backend
from lamina.block.session import Session
disk = Backend.open(sys.argv[1], session=Session(), format="raw", writable=True)
disk.writev([(n * 65536, bytes([n + 1]) * 65536) for n in range({FLUSHED})])
disk.flush()
threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGKILL)).start()
while True:
    disk.writev([(n * 262144, bytes([0x77]) * 262144) for n in range(4, 16)])
"""


@pytest.mark.parametrize("server_is_killed", [False, True], ids=["terminate", "kill"])
@pytest.mark.parametrize(
    ("python", "script"),
    [
        pytest.param(LIBNBD_PYTHON, LIBNBD_IS_KILLED, id="libnbd", marks=needs_nbdsh),
        pytest.param(sys.executable, LAMINA_IS_KILLED, id="lamina"),
    ],
)
def test_clients_that_are_killed(
    tmp_path: Path, python: str, script: str, server_is_killed: bool
) -> None:
    disk, socket = image(tmp_path, "qcow2"), tmp_path / "socket"
    with lamina_nbd(socket, "-f", "qcow2", disk) as server:
        done = subprocess.run(
            [python, "-c", script, url(socket)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        if not server_is_killed:
            # The others do not notice.
            commands = ["-c", "read -P 1 0 64k", "-c", "write -P 9 3840k 64k", "-c", "flush"]
            assert "failed" not in run("qemu-io", "-f", "raw", *commands, url(socket))
        else:
            server.kill()
            server.wait()
    assert_consistent(disk, leaks=server_is_killed)
    found = content_of(disk, "qcow2")
    for n in range(FLUSHED):
        assert found[n * 65536 : (n + 1) * 65536] == bytes([n + 1]) * 65536
    for at in range(FLUSHED * 65536, 3840 << 10, 512):
        allowed = (bytes(512), b"\x77" * 512) if at >= 1 << 20 else (bytes(512),)
        assert found[at : at + 512] in allowed, at
    if not server_is_killed:
        assert found[3840 << 10 : (3840 << 10) + 65536] == b"\x09" * 65536
