"""Space taken ahead of a growing file: who gets it, and that nothing of it stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.permissions import Perm
from lamina.protocols.file import allocation
from lamina.protocols.file.node import FileNode
from tests.unit.file.conftest import Opener

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fallocate")
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "grows"
    path.touch()
    return path


def allocated(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def append(node: FileNode, count: int, step: int = MIB) -> None:
    start = node.size
    for at in range(start, start + count * step, step):
        node.write(at, b"x" * step)


def test_long_appends_get_space_ahead(path: Path, open_file: Opener) -> None:
    node = open_file(path)
    append(node, 3)
    node.flush()
    assert allocated(path) <= 3 * MIB + 65536
    append(node, 3)
    assert allocated(path) >= 16 * MIB
    assert os.stat(path).st_size == node.size == 6 * MIB


@pytest.mark.parametrize("end", ["close", "read-only", "truncate", "zero", "jump"])
def test_what_was_not_used_is_given_back(path: Path, open_file: Opener, end: str) -> None:
    node = open_file(path)
    append(node, 6)
    node.flush()
    assert allocated(path) >= 16 * MIB
    if end == "close":
        node.close()
    elif end == "read-only":
        node.users[0].change(Perm.CONSISTENT_READ, Perm.ALL)
        node.reopen(read_only=True)
    elif end == "truncate":
        node.truncate(64 * MIB)
    elif end == "zero":
        node.write_zeroes(32 * MIB, 32 * MIB, WriteFlags.MAY_UNMAP)
    else:
        node.write(64 * MIB, b"x")
        node.flush()
    assert allocated(path) <= 6 * MIB + 65536
    with open(path, "rb") as file:
        assert file.read(6 * MIB) == b"x" * 6 * MIB


def test_sparse_files_stay_sparse(path: Path, open_file: Opener) -> None:
    node = open_file(path)
    node.write(100 * MIB, b"x" * 4096)
    for at in range(101, 120):
        node.write(at * MIB, b"x" * 4096)
    node.flush()
    assert allocated(path) <= 20 * 65536


def test_a_full_file_system(path: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def take(fd: int, offset: int, length: int) -> bool:
        tries.append(length)
        return False

    monkeypatch.setattr(allocation, "take", take)
    node = open_file(path)
    append(node, 40)
    assert len(tries) == 1
    node.truncate(48 * MIB, Preallocation.OFF)
    assert node.read(39 * MIB, MIB) == b"x" * MIB
