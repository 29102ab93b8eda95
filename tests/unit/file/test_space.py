"""Space taken for long writes: which of them get it, and that nothing else changes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.protocols.file import node as file_node
from lamina.protocols.file import space
from lamina.protocols.file.transfer import pieces
from tests.unit.file.conftest import Opener

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fallocate")
LONG = file_node._LONG


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "grows"
    path.touch()
    return path


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What files on any file system ask for."""
    ranges: list[tuple[int, int]] = []
    real = os.posix_fallocate

    def fallocate(fd: int, offset: int, length: int) -> None:
        ranges.append((offset, length))
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(space, "_file_system", lambda device: "ext4")
    return ranges


def test_long_writes_get_their_space_first(
    path: Path, open_file: Opener, taken: list[tuple[int, int]]
) -> None:
    node = open_file(path)
    node.truncate(64 * LONG)
    node.write(0, b"a" * LONG)
    node.write(32 * LONG, b"b" * (LONG - 1))
    half = b"c" * (LONG // 2)
    node.writev([(8 * LONG, half), (8 * LONG + len(half), half), (16 * LONG, b"d")])
    node.write(64 * LONG, b"e" * LONG)
    assert taken == [(0, LONG), (8 * LONG, LONG), (64 * LONG, LONG)]
    assert node.size == 65 * LONG
    node.flush()
    assert os.stat(path).st_blocks * 512 <= 4 * LONG + 2 * 65536
    assert node.read(8 * LONG, LONG) == b"c" * LONG


def test_a_file_without_holes_has_its_space(
    path: Path, open_file: Opener, taken: list[tuple[int, int]]
) -> None:
    node = open_file(path)
    node.write(0, b"a" * LONG)
    node.flush()
    taken.clear()
    node.write(0, b"b" * LONG)
    assert taken == []


def test_a_file_system_that_has_no_space_is_no_error_yet(
    path: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(space, "_file_system", lambda device: "ext4")
    node = open_file(path)
    node.write(0, b"a" * LONG)
    assert node.read(0, LONG) == b"a" * LONG


def test_the_type_of_a_file_system(path: Path) -> None:
    told = subprocess.run(
        ["df", "--output=fstype", path], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    assert space._file_system(os.stat(path).st_dev) == told
    assert space._file_system(os.makedev(4095, 1)) == ""
    assert not space._helps(os.open(os.devnull, os.O_RDWR))


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_pieces_are_the_same_bytes(buffers: list[bytes], longest: int) -> None:
    found = [b"".join(piece) for piece in pieces(buffers, longest)]
    assert b"".join(found) == b"".join(buffers)
    assert all(len(piece) == longest for piece in found[:-1])
    assert all(0 < len(piece) <= longest for piece in found[-1:])


@pytest.mark.parametrize("count", [1, 3])
def test_long_writes_to_space_that_is_there(
    path: Path, open_file: Opener, taken: list[tuple[int, int]], count: int
) -> None:
    size = 5 * file_node._PIECE + 4096
    data = random.Random(count).randbytes(size)
    with open(path, "wb") as file:
        file.write(b"x" * (size + 8192))
        file.flush()
        os.fsync(file.fileno())
    node = open_file(path)
    view, step = memoryview(data), -(-size // count)
    node.writev([(4096 + at, view[at : at + step]) for at in range(0, size, step)])
    assert taken == []
    assert node.read(0, size + 8192) == b"x" * 4096 + data + b"x" * 4096
