"""The kernel's client, without a kernel: what is asked of a device, in which order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import StorageError, UsageError
from lamina.tools.nbd import device
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.transmission_client import Request, pack_request
from tests.unit.nbd.serving import serving

SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK, CLEAR_QUE = 0xAB00, 0xAB01, 0xAB03, 0xAB04, 0xAB05
SET_SIZE_BLOCKS, DISCONNECT, SET_FLAGS = 0xAB07, 0xAB08, 0xAB0A


class Kernel:
    """Reads a sector of the disk when it is told to do it, then waits to be disconnected."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.read = b""
        self.socket = -1
        self.done = threading.Event()
        self.over = threading.Event()

    def ioctl(self, fd: int, request: int, argument: int = 0) -> int:
        if request == SET_SOCK:
            self.socket = argument
            argument = 0
        self.asked.append((request, argument))
        if request == DO_IT:
            self._do_it()
        if request == DISCONNECT:
            self.over.set()
        return 0

    def _do_it(self) -> None:
        import os
        import socket

        with socket.socket(fileno=os.dup(self.socket)) as connection:
            connection.sendall(pack_request(Request(nbd.CMD_READ, 0, 512), extended=False))
            self.read = connection.recv(16 + 512, socket.MSG_WAITALL)[16:]
            self.done.set()
            self.over.wait(10)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    one = Kernel()
    monkeypatch.setattr(device.fcntl, "ioctl", one.ioctl)
    return one


def test_attaching(kernel: Kernel, tmp_path: Path) -> None:
    node = tmp_path / "nbd0"
    node.touch()
    ended: list[Any] = []
    with serving(tmp_path, content=b"x" * 4096) as one:
        assert one.server is not None
        export = one.server.exports()[0]
        with device.attach(str(node), one.server, export, lambda: ended.append(1)):
            assert kernel.done.wait(10)
        flags = export.description.flags
    assert kernel.read == b"x" * 512
    assert kernel.asked == [
        (CLEAR_SOCK, 0),
        (SET_SOCK, 0),
        (SET_BLKSIZE, 512),
        (SET_SIZE_BLOCKS, 8),
        (SET_FLAGS, flags),
        (DO_IT, 0),
        (DISCONNECT, 0),
        (CLEAR_QUE, 0),
        (CLEAR_SOCK, 0),
    ]
    assert ended == [1]


def test_disconnecting(kernel: Kernel, tmp_path: Path) -> None:
    node = tmp_path / "nbd0"
    node.touch()
    device.disconnect(str(node))
    assert kernel.asked == [(CLEAR_QUE, 0), (DISCONNECT, 0), (CLEAR_SOCK, 0)]
    with pytest.raises(UsageError, match="No such file or directory"):
        device.disconnect(str(tmp_path / "none"))


def test_no_such_device(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        assert one.server is not None
        export = one.server.exports()[0]
        with (
            pytest.raises(StorageError, match="Failed to open"),
            device.attach(str(tmp_path / "none"), one.server, export, lambda: None),
        ):
            raise AssertionError
