"""Lock bytes: placed before others are looked for, taken back on failure, absent where they must.

How they fit QEMU's is in ``tests/interop/test_locks.py``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.block.permissions import Perm
from lamina.errors import Busy, StorageError, UsageError
from lamina.protocols.file import locks
from lamina.protocols.file.locks import FileLocks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open file description locks")
READ, WRITE, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE


@pytest.fixture
def pair(disk: Path) -> Iterator[tuple[FileLocks, FileLocks]]:
    """Two users of one file."""
    fds = [os.open(disk, os.O_RDONLY) for _ in range(2)]
    yield FileLocks(fds[0], str(disk)), FileLocks(fds[1], str(disk))
    for fd in fds:
        os.close(fd)


def test_what_excludes_what(pair: tuple[FileLocks, FileLocks]) -> None:
    first, second = pair
    first.apply(READ | WRITE, READ)
    second.apply(READ, Perm.ALL)
    for perm, shared, message in (
        (READ | WRITE, Perm.ALL, 'Failed to get "write" lock'),
        (READ | RESIZE, Perm.ALL, 'Failed to get "resize" lock'),
        (READ | Perm.WRITE_UNCHANGED, Perm.ALL, 'Failed to get "write unchanged" lock'),
        (READ, READ, 'Failed to get shared "write" lock'),
        (READ, Perm.ALL & ~READ, 'Failed to get shared "consistent read" lock'),
    ):
        with pytest.raises(Busy) as caught:
            second.apply(perm, shared)
        assert str(caught.value) == message
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("Is another process using the image [")


def test_a_refusal_leaves_no_trace(pair: tuple[FileLocks, FileLocks]) -> None:
    first, second = pair
    first.apply(READ, READ)
    with pytest.raises(Busy):
        second.apply(READ | WRITE, Perm.NONE)
    first.apply(READ | WRITE | RESIZE, Perm.NONE)  # nothing of second's attempt is in its way
    first.apply(Perm.NONE, Perm.ALL)
    second.apply(READ | WRITE, Perm.NONE)


def test_locks_are_placed_before_others_are_looked_for(
    pair: tuple[FileLocks, FileLocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that come at once, at least one sees the other."""
    first, _ = pair
    kinds: list[str] = []
    really = fcntl.fcntl

    def call(fd: int, command: int, argument: Any) -> Any:
        kinds.append("ask" if command == locks.F_OFD_GETLK else "place")
        return really(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", call)
    first.apply(READ | WRITE, READ)
    assert kinds == sorted(kinds, reverse=True)
    assert "ask" in kinds


def test_locks_move_to_another_descriptor(disk: Path, pair: tuple[FileLocks, FileLocks]) -> None:
    first, second = pair
    first.apply(READ | WRITE, READ)
    fd = os.open(disk, os.O_RDWR)
    first.move_to(fd)
    os.dup2(fd, first._fd)
    os.close(fd)
    with pytest.raises(Busy):
        second.apply(WRITE, Perm.ALL)
    first.apply(Perm.NONE, Perm.ALL)
    second.apply(WRITE, Perm.ALL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EIO, errno.EAGAIN])
def test_file_systems_without_locks(
    pair: tuple[FileLocks, FileLocks], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    if number in (errno.ENOLCK, errno.EINVAL):
        pair[0].apply(READ, READ)
    else:
        with pytest.raises((Busy, StorageError)):
            pair[0].apply(READ, READ)


@pytest.mark.parametrize(
    ("platform", "locking", "expected"),
    [
        ("linux", "auto", True),
        ("linux", "on", True),
        ("linux", "off", False),
        ("darwin", "auto", False),
        ("darwin", "on", True),
        ("win32", "auto", False),
        ("win32", "off", False),
    ],
)
def test_where_there_are_locks(
    monkeypatch: pytest.MonkeyPatch, platform: str, locking: str, expected: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert locks.available(locking) == expected


def test_windows_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="locking=on is not supported on Windows"):
        locks.available("on")


def test_neighbouring_bytes_are_one_call() -> None:
    assert locks._runs({103, 101, 100, 201}) == [(100, 2), (103, 1), (201, 1)]
