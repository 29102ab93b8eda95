"""Where a file has data and where it has none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.permissions import Perm
from lamina.protocols.file.node import FileNode
from tests.unit.file.conftest import Opener

pytestmark = pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="the host knows no holes")

MIB = 1 << 20


def kinds(node: FileNode, offset: int, length: int) -> list[tuple[int, int, bool]]:
    return [
        (one.guest_offset, one.length, one.kind is Kind.DATA)
        for one in node.extents(offset, length)
    ]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Data at 64 KiB … 128 KiB and at 512 KiB … 516 KiB, of 1 MiB."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(MIB)
        file.seek(65536)
        file.write(b"x" * 65536)
        file.seek(524288)
        file.write(b"x" * 4096)
    if not os.stat(path).st_blocks < MIB // 512:
        pytest.skip("the file system knows no holes")
    return path


EXPECTED = [
    (0, 65536, False),
    (65536, 65536, True),
    (131072, 393216, False),
    (524288, 4096, True),
    (528384, MIB - 528384, False),
]


def test_data_and_holes(sparse: Path, open_file: Opener) -> None:
    node = open_file(sparse)
    assert kinds(node, 0, MIB) == EXPECTED
    assert kinds(node, 70000, 100) == [(70000, 100, True)]
    assert kinds(node, 65535, 2) == [(65535, 1, False), (65536, 1, True)]
    first = node.extents(70000, 100)[0]
    assert (first.node, first.host_offset) == (node, 70000)


def test_in_pieces_as_in_one(sparse: Path, open_file: Opener) -> None:
    node = open_file(sparse)
    for step in (512, 4096, 30000):
        merged: list[tuple[int, int, bool]] = []
        for start in range(0, MIB, step):
            for offset, length, data in kinds(node, start, min(step, MIB - start)):
                if merged and merged[-1][2] == data:
                    merged[-1] = (merged[-1][0], merged[-1][1] + length, data)
                else:
                    merged.append((offset, length, data))
        assert merged == EXPECTED


def test_the_last_sector_is_cut_where_the_file_ends(tmp_path: Path, open_file: Opener) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    assert kinds(open_file(path), 0, 1024) == [(0, 1000, True), (1000, 24, False)]


class Seeks:
    """Counts how often the file system is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        really = os.lseek

        def lseek(fd: int, position: int, whence: int) -> int:
            self.count += 1
            return really(fd, position, whence)

        monkeypatch.setattr(os, "lseek", lseek)


def test_long_data_is_asked_for_once(
    tmp_path: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * MIB)
    node = open_file(path)
    seeks = Seeks(monkeypatch)
    for offset in range(0, MIB, 4096):
        assert kinds(node, offset, 4096) == [(offset, 4096, True)]
    assert seeks.count == 2


@pytest.mark.parametrize("shared", [Perm.ALL, Perm.CONSISTENT_READ])
def test_holes_are_remembered_while_nobody_else_may_write(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch, shared: Perm
) -> None:
    node = open_file(disk, writer=False)
    node.used_by(None, "reader", Perm.CONSISTENT_READ, shared)
    seeks = Seeks(monkeypatch)
    for offset in range(0, MIB, 65536):
        assert kinds(node, offset, 4096) == [(offset, 4096, False)]
    assert seeks.count == (1 if shared == Perm.CONSISTENT_READ else MIB // 65536)


def test_what_others_write_is_seen(disk: Path, open_file: Opener) -> None:
    node = open_file(disk)
    assert kinds(node, 0, MIB) == [(0, MIB, False)]
    with open(disk, "r+b") as file:
        file.write(b"x" * 4096)
    assert kinds(node, 0, MIB) == [(0, 4096, True), (4096, MIB - 4096, False)]


def test_what_we_change_is_seen(disk: Path, open_file: Opener) -> None:
    node = open_file(disk, writer=False, read_only=False)
    node.used_by(None, "writer", Perm.WRITE | Perm.RESIZE, Perm.CONSISTENT_READ)
    assert kinds(node, 0, MIB) == [(0, MIB, False)]
    node.write(0, b"x" * 65536)
    assert kinds(node, 0, MIB) == [(0, 65536, True), (65536, MIB - 65536, False)]
    node.discard(0, 4096)
    assert kinds(node, 0, 65536) == [(0, 4096, False), (4096, 61440, True)]
    node.write_zeroes(8192, 4096, WriteFlags.MAY_UNMAP)
    assert kinds(node, 0, 16384)[-2:] == [(8192, 4096, False), (12288, 4096, True)]
    node.truncate(2 * MIB)
    assert kinds(node, MIB, MIB) == [(MIB, MIB, False)]
    node.write(2 * MIB, b"x" * 4096)
    assert kinds(node, MIB, MIB + 4096) == [(MIB, MIB, False), (2 * MIB, 4096, True)]


def test_file_systems_that_know_no_holes(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    node = open_file(disk)
    monkeypatch.setattr(os, "lseek", unsupported)
    assert kinds(node, 0, MIB) == [(0, MIB, True)]


def test_a_hole_that_appears_while_we_look(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEEK_DATA has found data here, then somebody punches it out: all is read, nothing hangs."""
    node = open_file(disk)
    monkeypatch.setattr(os, "lseek", lambda fd, position, whence: position)
    assert kinds(node, 0, 8) == [(0, 8, True)]
