"""Durability: when the host is asked for it, and what a refusal means."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from lamina.block.limits import WriteFlags
from lamina.errors import StorageError
from lamina.protocols.file import node as file_node
from tests.unit.file.conftest import Opener


class Host:
    """Counts flushes, fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.error = 0
        self.before = lambda: None
        monkeypatch.setattr(file_node, "_synchronise", self._flush)

    def _flush(self, fd: int) -> None:
        self.count += 1
        self.before()
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_only_changes_are_flushed(disk: Path, open_file: Opener, host: Host) -> None:
    node = open_file(disk)
    node.flush()
    assert host.count == 0
    for change in (
        lambda: node.write(0, b"x"),
        lambda: node.write_zeroes(0, 4096),
        lambda: node.write_zeroes(0, 4096, WriteFlags.MAY_UNMAP),
        lambda: node.discard(0, 4096),
        lambda: node.truncate(1 << 21),
    ):
        before = host.count
        change()
        node.flush()
        node.flush()
        assert host.count == before + 1


def test_forced_writes_flush(disk: Path, open_file: Opener, host: Host) -> None:
    node = open_file(disk)
    node.writev([(0, b"x")], WriteFlags.FUA)
    assert host.count == 1
    node.write_zeroes(0, 4096, WriteFlags.FUA)
    assert host.count == 2


def test_unsafe_files_are_not_flushed(disk: Path, open_file: Opener, host: Host) -> None:
    node = open_file(disk, no_flush=True)
    node.write(0, b"x")
    node.flush()
    node.close()
    assert host.count == 0


def test_closing_flushes(disk: Path, open_file: Opener, host: Host) -> None:
    node = open_file(disk)
    node.write(0, b"x")
    node.close()
    assert host.count == 1


def test_a_failed_flush_stays_failed(disk: Path, open_file: Opener, host: Host) -> None:
    """The host forgets what it could not write; a second, successful flush would be a lie."""
    node = open_file(disk)
    node.write(0, b"x")
    host.error = errno.EIO
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            node.flush()
        assert caught.value.errno == errno.EIO
    host.error = 0
    with pytest.raises(StorageError, match="Input/output error"):
        node.flush()
    with pytest.raises(StorageError):
        node.close()
    assert node.closed


def test_nobody_overtakes_a_flush(disk: Path, open_file: Opener, host: Host) -> None:
    """A second flush finds nothing to do, but must wait until the first one is through."""
    node = open_file(disk)
    node.write(0, b"x")
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(10)

    host.before = wait
    first = threading.Thread(target=node.flush)
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=node.flush)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert host.count == 1


def test_a_write_during_a_flush_needs_another(disk: Path, open_file: Opener, host: Host) -> None:
    node = open_file(disk)
    node.write(0, b"x")
    host.before = lambda: node.write(4096, b"y")
    node.flush()
    host.before = lambda: None
    node.flush()
    assert host.count == 2
