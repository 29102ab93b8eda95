"""Zeroing, punching, growing and shrinking, on file systems that can do more and less."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.block.limits import Preallocation, WriteFlags
from lamina.errors import ImageUnsupported, StorageError, UsageError
from lamina.protocols.file import allocation
from tests.unit.file.conftest import Opener

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fallocate")


class Kernel:
    """fallocate, with modes that can be switched off; records its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[int, int] = {}
        """Mode -> errno."""
        self.calls: list[tuple[int, int, int]] = []
        really = allocation._fallocate

        def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
            self.calls.append((mode, offset, length))
            number = self.errors.get(mode, 0)
            if number in allocation.UNSUPPORTED:
                return False
            if number:
                raise OSError(number, os.strerror(number))
            return really(fd, mode, offset, length)

        monkeypatch.setattr(allocation, "_fallocate", fallocate)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


PUNCH = allocation.PUNCH_HOLE | allocation.KEEP_SIZE
ZERO = allocation.ZERO_RANGE
ALLOCATE = 0


@pytest.mark.parametrize(
    ("flags", "unsupported", "modes"),
    [
        (WriteFlags.MAY_UNMAP, [], [PUNCH]),
        (WriteFlags.MAY_UNMAP, [PUNCH], [PUNCH, ZERO]),
        (WriteFlags.MAY_UNMAP, [PUNCH, ZERO], [PUNCH, ZERO]),
        (WriteFlags.NONE, [], [ZERO]),
        (WriteFlags.NONE, [ZERO], [ZERO, PUNCH, ALLOCATE]),
        (WriteFlags.NONE, [ZERO, PUNCH], [ZERO, PUNCH]),
        (WriteFlags.NONE, [ZERO, ALLOCATE], [ZERO, PUNCH, ALLOCATE]),
    ],
)
def test_ways_to_zero(
    disk: Path,
    open_file: Opener,
    kernel: Kernel,
    flags: WriteFlags,
    unsupported: list[int],
    modes: list[int],
) -> None:
    kernel.errors = dict.fromkeys(unsupported, errno.EOPNOTSUPP)
    node = open_file(disk)
    node.write(0, b"x" * 65536)
    node.write_zeroes(4096, 8192, flags)
    assert [mode for mode, _, _ in kernel.calls] == modes
    assert node.read(0, 65536) == b"x" * 4096 + bytes(8192) + b"x" * (65536 - 12288)


@pytest.mark.parametrize("flags", [WriteFlags.NONE, WriteFlags.MAY_UNMAP])
def test_no_fallback_means_none(
    disk: Path, open_file: Opener, kernel: Kernel, flags: WriteFlags
) -> None:
    kernel.errors = dict.fromkeys((ZERO, PUNCH, ALLOCATE), errno.EOPNOTSUPP)
    node = open_file(disk)
    node.write(0, b"x" * 4096)
    with pytest.raises(ImageUnsupported, match="Operation not supported"):
        node.write_zeroes(0, 4096, flags | WriteFlags.NO_FALLBACK)
    assert node.read(0, 4096) == b"x" * 4096


def test_other_errors_are_errors(disk: Path, open_file: Opener, kernel: Kernel) -> None:
    kernel.errors = {ZERO: errno.ENOSPC, PUNCH: errno.EIO}
    node = open_file(disk)
    with pytest.raises(StorageError) as caught:
        node.write_zeroes(0, 4096)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError) as caught:
        node.discard(0, 4096)
    assert caught.value.errno == errno.EIO


def test_space_is_kept_or_given_back(disk: Path, open_file: Opener) -> None:
    def blocks() -> int:
        return os.stat(disk).st_blocks * 512

    node = open_file(disk)
    node.write(0, b"x" * MIB)
    node.flush()
    full = blocks()
    node.write_zeroes(0, MIB // 2)
    assert blocks() == full
    node.write_zeroes(0, MIB // 2, WriteFlags.MAY_UNMAP)
    assert blocks() <= full - MIB // 2
    node.discard(MIB // 2, MIB // 2)
    assert blocks() <= full - MIB + 65536
    assert node.read(0, MIB) == bytes(MIB)


def test_discards_are_ignored_where_they_are_not_wanted(disk: Path, open_file: Opener) -> None:
    node = open_file(disk, unmap=False)
    node.write(0, b"x" * 4096)
    node.discard(0, 4096)
    assert node.read(0, 4096) == b"x" * 4096


def test_discards_are_ignored_where_nobody_can(
    disk: Path, open_file: Opener, kernel: Kernel
) -> None:
    kernel.errors = {PUNCH: errno.EOPNOTSUPP}
    node = open_file(disk)
    node.write(0, b"x" * 4096)
    node.discard(0, 4096)
    assert node.read(0, 4096) == b"x" * 4096


def test_a_file_system_that_misbehaves(
    disk: Path, open_file: Opener, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.errors = {PUNCH: errno.EINVAL}
    allocation._warn_of_misbehaviour.cache_clear()
    node = open_file(disk)
    node.write(0, b"x" * 4096)
    for _ in range(3):
        node.write_zeroes(0, 4096, WriteFlags.MAY_UNMAP)
    assert node.read(0, 4096) == bytes(4096)
    assert [one.message for one in caplog.records] == [
        "Your file system is misbehaving: fallocate(FALLOC_FL_PUNCH_HOLE) returned EINVAL. "
        "Please report this bug to your file system vendor."
    ]


@pytest.mark.parametrize("flags", [WriteFlags.NONE, WriteFlags.MAY_UNMAP])
@pytest.mark.parametrize("unsupported", [(), (ZERO,), (ZERO, PUNCH)])
def test_zeroes_behind_the_end(
    disk: Path,
    open_file: Opener,
    kernel: Kernel,
    flags: WriteFlags,
    unsupported: tuple[int, ...],
) -> None:
    kernel.errors = dict.fromkeys(unsupported, errno.EOPNOTSUPP)
    node = open_file(disk)
    node.write(MIB - 4096, b"x" * 4096)
    node.write_zeroes(MIB - 2048, 4096, flags)
    assert node.size == os.stat(disk).st_size == MIB + 2048
    node.write_zeroes(MIB + 4096, 4096, flags)
    assert node.size == os.stat(disk).st_size == MIB + 8192
    assert node.read(MIB - 4096, 12288) == b"x" * 2048 + bytes(10240)


def test_nobody_cuts_off_what_others_append(disk: Path, open_file: Opener) -> None:
    """Zeroing and growing set a length; a write behind it at the same moment must survive."""
    node = open_file(disk)
    step = 4096

    def append(first: int, zero: bool) -> None:
        for number in range(first, 400, 4):
            at = MIB + number * step
            if zero:
                node.write_zeroes(at, step, WriteFlags.MAY_UNMAP)
            else:
                node.write(at, bytes([number % 255 + 1]) * step)

    threads = [threading.Thread(target=append, args=(n, n % 2 == 0)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(400):
        expected = bytes(step) if number % 2 == 0 else bytes([number % 255 + 1]) * step
        assert node.read(MIB + number * step, step) == expected


@pytest.mark.parametrize(("mode", "allocated"), [("off", False), ("falloc", True), ("full", True)])
def test_growing(disk: Path, open_file: Opener, mode: str, allocated: bool) -> None:
    node = open_file(disk)
    node.truncate(2 * MIB, Preallocation(mode))
    assert node.size == os.stat(disk).st_size == 2 * MIB
    assert (os.stat(disk).st_blocks * 512 >= MIB) == allocated
    assert node.read(MIB, MIB) == bytes(MIB)


def test_what_preallocation_cannot(disk: Path, open_file: Opener) -> None:
    node = open_file(disk)
    with pytest.raises(UsageError, match="Unsupported preallocation mode: metadata"):
        node.truncate(2 * MIB, Preallocation.METADATA)
    with pytest.raises(UsageError, match="Cannot use preallocation for shrinking files"):
        node.truncate(4096, Preallocation.FULL)
    assert node.size == MIB
    with pytest.raises(StorageError, match="Could not resize file: "):
        node.truncate((1 << 63) - 512)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("needs root")
    home = tmp_path / "small"
    home.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(home)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount")
    yield home
    subprocess.run(["umount", str(home)], check=True)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("falloc", "Could not preallocate new data: No space left on device"),
        ("full", "Could not write zeros for preallocation: No space left on device"),
    ],
)
def test_a_file_system_that_is_too_small(
    small: Path, open_file: Opener, mode: str, message: str
) -> None:
    path = small / "file"
    path.write_bytes(b"x" * 65536)
    node = open_file(path)
    with pytest.raises(StorageError) as caught:
        node.truncate(2 * MIB, Preallocation(mode))
    assert str(caught.value) == message
    assert node.size == os.stat(path).st_size == 65536
    assert node.read(0, 65536) == b"x" * 65536


def test_interrupted_calls_are_repeated(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    answers = [errno.EINTR, errno.EINTR, 0]

    def call(*_: Any) -> int:
        number = answers.pop(0)
        ctypes.set_errno(number)
        return -1 if number else 0

    monkeypatch.setattr(allocation, "_fallocate_function", lambda: call)
    with open(disk, "rb") as file:
        assert allocation.punch(file.fileno(), 0, 4096)
    assert answers == []
