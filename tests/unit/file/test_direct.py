"""O_DIRECT: what is aligned, how that is found out, and buffers that are not."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.block.permissions import Perm
from lamina.errors import Refused, StorageError
from lamina.protocols.file import direct
from tests.unit.file.conftest import Opener

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")


class Picky:
    """A host that takes only aligned reads: of requests, and of memory."""

    def __init__(self, request: int, memory: int) -> None:
        self.request = request
        self.memory = memory

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        for buffer in buffers:
            if (offset | len(buffer)) % self.request or direct.address(buffer) % self.memory:
                raise OSError(errno.EINVAL, "")
        return os.preadv(fd, buffers, offset)


@pytest.mark.parametrize(
    ("request_alignment", "memory_alignment", "expected"),
    [
        (512, 512, (512, 512)),
        (4096, 512, (4096, 512)),
        (4096, 4096, (4096, 4096)),
        (1024, 1, (1024, 4096)),
        (1, 1, (4096, 4096)),  # anything goes: that says nothing
    ],
)
def test_probing(
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    request_alignment: int,
    memory_alignment: int,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr(direct, "preadv", Picky(request_alignment, memory_alignment).preadv)
    monkeypatch.setattr(direct, "_ask_host", lambda fd: (0, 0))
    with open(disk, "rb") as file:
        assert direct.probe_alignment(file.fileno()) == expected


def test_probing_in_vain(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "preadv", Picky(1 << 20, 1).preadv)
    monkeypatch.setattr(direct, "_ask_host", lambda fd: (0, 0))
    with open(disk, "rb") as file, pytest.raises(StorageError) as caught:
        direct.probe_alignment(file.fileno())
    assert str(caught.value) == "Could not find working O_DIRECT alignment"
    assert caught.value.hint == "Try cache.direct=off"


def test_who_is_asked_first(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_ask_host", lambda fd: (2048, 8))
    with open(disk, "rb") as file:
        assert direct.probe_alignment(file.fileno()) == (2048, 8)


def test_addresses() -> None:
    area = mmap.mmap(-1, 8192)
    view = memoryview(area)
    assert direct.address(view) % mmap.PAGESIZE == 0
    assert direct.address(view[3:]) % mmap.PAGESIZE == 3
    assert direct.address(b"read-only") == 1
    assert direct.address(memoryview(bytearray())) == 1


@pytest.mark.parametrize("shift", [0, 1, 512])
@pytest.mark.parametrize(("offset", "length"), [(0, 8192), (4096, 3 << 20), (100, 5000)])
def test_any_memory(
    tmp_path: Path, open_file: Opener, shift: int, offset: int, length: int
) -> None:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(4 << 20)
    data = random.Random(length).randbytes(length)
    area = memoryview(mmap.mmap(-1, length + shift))[shift:]
    area[:] = data
    node = open_file(path, direct=True)
    node.writev([(offset, area)])
    assert path.read_bytes()[offset : offset + length] == data
    area[:] = bytes(length)
    node.readv([(offset, area)])
    assert area == memoryview(data)


def test_the_end_of_a_crooked_file(tmp_path: Path, open_file: Opener) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 5000)
    node = open_file(path, direct=True)
    assert node.size == 5120
    assert node.read(0, 5120) == b"x" * 5000 + bytes(120)
    assert node.read(4999, 100) == b"x" + bytes(99)


def test_writers_of_a_crooked_file_must_be_allowed_to_grow_it(
    tmp_path: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_ask_host", lambda fd: (4096, 512))
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 5000)
    node = open_file(path, writer=False, read_only=False, direct=True)
    with pytest.raises(Refused) as caught:
        node.used_by(None, "writer", Perm.WRITE, Perm.ALL)
    assert str(caught.value) == (
        "Cannot get 'write' permission without 'resize': "
        "Image size is not a multiple of request alignment"
    )
    node.used_by(None, "writer", Perm.WRITE | Perm.RESIZE, Perm.ALL)
    node.write(4999, b"yy")
    assert node.read(4998, 3) == b"xyy"
