"""Another descriptor under the same number, while requests are under way."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lamina.block.permissions import Perm
from lamina.errors import StorageError
from tests.unit.file.conftest import Opener


def test_readers_notice_nothing(disk: Path, open_file: Opener) -> None:
    disk.write_bytes(b"x" * (1 << 20))
    node = open_file(disk, writer=False)
    node.used_by(None, "reader", Perm.CONSISTENT_READ, Perm.ALL)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                assert node.read(4096, 4096) == b"x" * 4096
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(50):
        node.reopen(read_only=turn % 2 == 1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert node.read_only


def test_writing_after_all(disk: Path, open_file: Opener) -> None:
    node = open_file(disk, writer=False)
    with pytest.raises(StorageError):
        node.write(0, b"x")
    node.reopen(read_only=False)
    node.write(0, b"x")
    node.reopen(read_only=True)
    with pytest.raises(StorageError):
        node.write(0, b"y")
    assert disk.read_bytes()[:1] == b"x"


def test_a_file_that_is_gone(disk: Path, open_file: Opener) -> None:
    node = open_file(disk, writer=False)
    os.unlink(disk)
    with pytest.raises(StorageError, match="No such file or directory"):
        node.reopen(read_only=False)
    assert node.read_only
    assert node.read(0, 16) == bytes(16)


def test_no_descriptor_is_lost(disk: Path, open_file: Opener) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("nobody counts them here")
    before = len(os.listdir("/proc/self/fd"))
    node = open_file(disk)
    for turn in range(10):
        if turn % 2 == 0:
            node.users[0].change(Perm.CONSISTENT_READ, Perm.ALL)
        node.reopen(read_only=turn % 2 == 0)
    node.close()
    assert len(os.listdir("/proc/self/fd")) == before
