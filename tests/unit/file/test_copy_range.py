"""Copies inside the kernel, and where there are none."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import StorageError
from lamina.testing.memory import MemoryFile
from tests.unit.file.conftest import Opener

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the host does not copy")

DATA = random.Random(5).randbytes(100_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def test_copies(source: Path, disk: Path, open_file: Opener) -> None:
    target = open_file(disk)
    node = open_file(source, writer=False)
    assert target.copy_range_from(node, 1000, 5000, 50_000) == 50_000
    assert target.read(5000, 50_000) == DATA[1000:51_000]
    assert target.copy_range_from(node, 0, 1 << 20, 4096) == 4096
    assert target.size == (1 << 20) + 4096


def test_the_end_of_the_source(source: Path, disk: Path, open_file: Opener) -> None:
    target = open_file(disk)
    node = open_file(source, writer=False)
    assert target.copy_range_from(node, 90_000, 0, 50_000) == 10_000
    assert target.copy_range_from(node, 100_000, 0, 1000) == 0


def test_other_kinds_of_sources(disk: Path, open_file: Opener) -> None:
    assert open_file(disk).copy_range_from(MemoryFile(DATA), 0, 0, 1000) == 0


@pytest.mark.parametrize(
    "number", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO]
)
def test_what_the_kernel_does_not_want(
    source: Path,
    disk: Path,
    open_file: Opener,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    really = os.copy_file_range

    def copy(source_fd: int, target_fd: int, count: int, *offsets: Any) -> int:
        if offsets[0] >= 8192:
            raise OSError(number, os.strerror(number))
        return really(source_fd, target_fd, min(count, 4096), *offsets)

    monkeypatch.setattr(os, "copy_file_range", copy)
    target = open_file(disk)
    node = open_file(source, writer=False)
    if number == errno.EIO:
        with pytest.raises(StorageError, match="Input/output error"):
            target.copy_range_from(node, 0, 0, 50_000)
    else:
        assert target.copy_range_from(node, 0, 0, 50_000) == 8192
    assert target.read(0, 8192) == DATA[:8192]
