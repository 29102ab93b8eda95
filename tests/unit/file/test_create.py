"""New files, and old ones that are emptied."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamina.block.permissions import Perm
from lamina.errors import Busy, LaminaError, StorageError, UsageError
from lamina.protocols.file import DRIVER, FileCreateOptions
from tests.unit.file.conftest import Opener

MIB = 1 << 20


def create(path: Path | str, **options: Any) -> list[str]:
    """The warnings."""
    warnings: list[str] = []
    context = SimpleNamespace(warn=warnings.append)
    DRIVER.create_file(str(path), FileCreateOptions(**options), context)
    return warnings


@pytest.mark.parametrize(("mode", "allocated"), [("off", 4096), ("falloc", MIB), ("full", MIB)])
def test_preallocation(tmp_path: Path, mode: str, allocated: int) -> None:
    path = tmp_path / "new"
    assert create(path, size=MIB, preallocation=mode) == []
    found = os.stat(path)
    assert found.st_size == MIB
    assert found.st_blocks * 512 == allocated
    assert path.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("size", [0, 512, 1000])
def test_small_files(tmp_path: Path, size: int) -> None:
    create(tmp_path / "new", size=size)
    assert (tmp_path / "new").read_bytes() == bytes(size)


def test_old_content_is_gone(disk: Path) -> None:
    disk.write_bytes(b"x" * MIB)
    create(f"file:{disk}", size=65536)
    assert disk.read_bytes() == bytes(65536)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/new", "Could not create '{}': No such file or directory"),
        ("", "Could not create '{}': Is a directory"),
    ],
)
def test_places_where_nothing_can_be(tmp_path: Path, name: str, message: str) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(StorageError) as caught:
        create(path, size=512)
    assert str(caught.value) == message.format(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="requires '/dev/null' to be a regular file"):
        create("/dev/null", size=512)
    with pytest.raises(UsageError, match="Invalid argument"):
        create("a\0b", size=512)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("metadata", "Unsupported preallocation mode: metadata"),
        ("magic", "invalid parameter value: magic"),
    ],
)
def test_unknown_preallocation(tmp_path: Path, mode: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        create(tmp_path / "new", size=512, preallocation=mode)
    assert str(caught.value) == message


def test_sizes_that_no_file_has(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"Could not resize file: "):
        create(tmp_path / "new", size=(1 << 63) - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="lock bytes")
def test_a_file_in_use_is_left_alone(disk: Path, open_file: Opener) -> None:
    disk.write_bytes(b"x" * MIB)
    node = open_file(disk, writer=False)
    node.used_by(None, "reader", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
    with pytest.raises(Busy, match='Failed to get "write" lock') as caught:
        create(disk, size=512)
    assert caught.value.hint == f"Is another process using the image [{disk}]?"
    assert disk.read_bytes() == b"x" * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="an ioctl of Linux")
def test_extent_size_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct

    sent: list[tuple[int, int]] = []
    unsupported = False

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        if unsupported:
            raise OSError(errno.EOPNOTSUPP, "")
        if request == 0x401C5820:
            flags, size = struct.unpack_from("@II", argument)
            sent.append((flags, size))
        return argument

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    create(tmp_path / "new", size=512)
    create(tmp_path / "new", size=512, extent_size_hint=65536)
    create(tmp_path / "new", size=512, extent_size_hint=0)
    assert sent == [(0x800, MIB), (0x800, 65536)]
    unsupported = True
    assert create(tmp_path / "new", size=512) == []
    assert create(tmp_path / "new", size=512, extent_size_hint=65536) == [
        "warning: Failed to set extent size hint: Operation not supported"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="an ioctl of Linux")
def test_nocow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct

    sent: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        if request == 0x80086601:
            return struct.pack("@l", 0x10)
        if request == 0x40086602:
            sent.append(struct.unpack("@l", argument)[0])
            raise OSError(errno.EOPNOTSUPP, "")
        return argument

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert create(tmp_path / "new", size=512, nocow=True) == []
    assert sent == [0x00800010]
    create(tmp_path / "new", size=512)
    assert len(sent) == 1
