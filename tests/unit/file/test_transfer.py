"""Batches become few system calls, and calls that do less than asked are continued."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.block.limits import WriteFlags
from lamina.errors import StorageError
from lamina.protocols.file import node as file_node
from lamina.protocols.file import positioned, transfer
from tests.unit.file.conftest import Opener


def test_neighbours_become_one_call() -> None:
    requests = [(0, b"a" * 512), (512, b"b" * 512), (1024, b"c" * 10), (4096, b"d"), (1034, b"e")]
    found = [(offset, len(buffers), length) for offset, buffers, length in transfer.runs(requests)]
    assert found == [(0, 3, 1034), (4096, 1, 1), (1034, 1, 1)]


def test_no_more_buffers_than_the_host_takes() -> None:
    count = transfer.MAX_BUFFERS + 10
    requests = [(at, b"x") for at in range(count)]
    found = list(transfer.runs(requests))
    assert [len(buffers) for _, buffers, _ in found] == [transfer.MAX_BUFFERS, 10]
    assert [offset for offset, _, _ in found] == [0, transfer.MAX_BUFFERS]


def test_empty_buffers_are_no_obstacle() -> None:
    found = transfer.runs([(0, b""), (0, b"a"), (1, b"")])
    assert [(offset, length) for offset, _, length in found] == [(0, 1)]
    assert transfer.runs([]) == []


class Stingy:
    """System calls that do less than they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.calls = 0
        self._most = most
        for module in (transfer, file_node):
            monkeypatch.setattr(module, "preadv", self.preadv)
            monkeypatch.setattr(module, "pwritev", self.pwritev)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        self.calls += 1
        return os.preadv(fd, self._cut(buffers), offset)

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        self.calls += 1
        return os.pwritev(fd, self._cut(buffers), offset)

    def _cut(self, buffers: Any) -> list[memoryview]:
        left, cut = self._most, []
        for buffer in buffers:
            part = memoryview(buffer)[:left]
            left -= len(part)
            if len(part):
                cut.append(part)
        return cut


@pytest.mark.parametrize("most", [1, 7, 512, 1000])
def test_short_transfers_are_continued(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    stingy = Stingy(monkeypatch, most)
    data = random.Random(most).randbytes(3000)
    node = open_file(disk)
    node.writev([(0, data[:1000]), (1000, data[1000:2500]), (5000, data[2500:])])
    assert stingy.calls > 2
    assert disk.read_bytes()[:2500] == data[:2500]
    found = bytearray(2500)
    node.readv([(0, memoryview(found)[:999]), (999, memoryview(found)[999:])])
    assert found == data[:2500]
    assert node.read(5000, 500) == data[2500:]


def test_behind_the_end_are_zeroes(tmp_path: Path, open_file: Opener) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    node = open_file(path)
    assert node.read(0, 512) == b"x" * 100 + bytes(412)
    buffers = [bytearray(b"?" * 60), bytearray(b"?" * 60), bytearray(b"?" * 60)]
    node.readv([(at * 60, memoryview(buffer)) for at, buffer in enumerate(buffers)])
    assert b"".join(buffers) == b"x" * 100 + bytes(80)
    assert node.read(1 << 40, 10) == bytes(10)


def test_one_call_for_a_whole_batch(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    generous = Stingy(monkeypatch, 1 << 30)
    node = open_file(disk)
    node.writev([(at, b"x" * 512) for at in range(0, 65536, 512)])
    assert generous.calls == 1
    node.readv([(at, memoryview(bytearray(512))) for at in range(0, 65536, 512)])
    assert generous.calls == 2


@pytest.mark.parametrize(
    "request_at",
    [
        lambda node, at: node.read(at, 512),
        lambda node, at: node.write(at, bytes(512)),
        lambda node, at: node.writev([(at, bytes(512)), (0, bytes(512))]),
        lambda node, at: node.write_zeroes(at, 4096),
        lambda node, at: node.write_zeroes(at, 4096, WriteFlags.MAY_UNMAP),
        lambda node, at: node.discard(at, 4096),
    ],
)
@pytest.mark.parametrize("offset", [1 << 63, 1 << 64, -4096])
@pytest.mark.parametrize("direct", [False, True])
def test_offsets_that_no_file_has(
    disk: Path, open_file: Opener, request_at: Any, offset: int, direct: bool
) -> None:
    """Least of all those that are 0 when cut to 64 bits."""
    disk.write_bytes(b"x" * (1 << 20))
    node = open_file(disk, direct=direct)
    with pytest.raises(StorageError):
        request_at(node, offset)
    assert disk.read_bytes()[512:] == b"x" * ((1 << 20) - 512)


def test_a_full_disk(disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "")

    node = open_file(disk)
    monkeypatch.setattr(file_node, "pwritev", full)
    for requests in ([(0, b"x")], [(0, b"x"), (1 << 21, b"y")]):
        with pytest.raises(StorageError) as caught:
            node.writev(requests)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value) == "No space left on device"
        assert caught.value.path == str(disk)
    assert node.size == 1 << 20


def test_growing_notices_how_far_a_failed_write_came(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.pwritev

    def once(fd: int, buffers: Any, offset: int) -> int:
        if offset > 1 << 20:
            raise OSError(errno.ENOSPC, "")
        return really(fd, buffers, offset)

    monkeypatch.setattr(file_node, "pwritev", once)
    node = open_file(disk)
    with pytest.raises(StorageError):
        node.writev([(1 << 20, b"x" * 512), (1 << 21, b"y")])
    assert node.size == (1 << 20) + 512


def test_hosts_without_positioned_calls(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert positioned.pwritev(fd, [b"hello", memoryview(b", "), bytearray(b"world")], 3) == 12
        assert path.read_bytes() == bytes(3) + b"hello, world"
        first, second = bytearray(5), bytearray(20)
        assert positioned.preadv(fd, [memoryview(first), memoryview(second)], 3) == 12
        assert first == b"hello"
        assert second[:7] == b", world"
        assert positioned.preadv(fd, [memoryview(first)], 100) == 0
    finally:
        os.close(fd)
