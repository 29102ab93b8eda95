"""Advisory locks on single bytes that tell other processes what is done with an image.

For every permission that is *held*, a shared lock lies on byte 100 + bit; for every permission that
is *not shared* with others, on byte 200 + bit (``Perm`` numbers the bits). A permission is free to
take if no other descriptor has locked the byte that forbids it. All locks are shared ones, which
work on read-only descriptors too; conflicts are found by asking whether an exclusive lock *could*
be taken. QEMU uses the same bytes, so the two guard images against each other.

The locks are Linux's "open file description" locks: they belong to the descriptor, not to the
process, and two nodes of one process see each other's.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress

from lamina.block.permissions import NAMES, Perm
from lamina.errors import Busy, StorageError, UsageError

HELD_BASE = 100
UNSHARED_BASE = 200

# Of linux/fcntl.h; the fcntl module has them from Python 3.9 or 3.13 on, depending on the platform.
F_OFD_GETLK = 36
F_OFD_SETLK = 37

# struct flock, in the member order of the platform.
if sys.platform == "linux":
    _FLOCK = struct.Struct("@hhqqi0q")
    _TYPE_FIELD = 0
else:
    _FLOCK = struct.Struct("@qqihhi0q")
    _TYPE_FIELD = 3


def available(locking: str) -> bool:
    """Whether ``locking=auto|on|off`` means locks on this host.

    Locks that belong to a process rather than to a descriptor are dropped when any of its
    descriptors of the file is closed; they are only used where the user insists. Raises UsageError.
    """
    if locking == "off":
        return False
    if sys.platform == "win32":
        if locking == "on":
            raise UsageError("locking=on is not supported on Windows")
        return False
    return locking == "on" or sys.platform == "linux"


def _bytes_of(held: Perm, unshared: Perm) -> set[int]:
    """The bytes to lock for holding and not sharing these permissions."""
    return {HELD_BASE + bit for bit in range(len(NAMES)) if held >> bit & 1} | {
        UNSHARED_BASE + bit for bit in range(len(NAMES)) if unshared >> bit & 1
    }


class FileLocks:
    """The lock bytes of one open file."""

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._locked: set[int] = set()

    def apply(self, perm: Perm, shared: Perm) -> None:
        """Hold ``perm``, let others hold ``shared``. Raises Busy; then nothing has changed.

        New locks are placed before others are looked for, so that of two processes that start at
        once at least one sees the other.
        """
        wanted = _bytes_of(perm, Perm.ALL & ~shared)
        new = wanted - self._locked
        try:
            if not self._place(self._fd, new):
                return
            self._check_others(perm, Perm.ALL & ~shared)
        except BaseException:
            self._release(new)
            raise
        self._release(self._locked - wanted)
        self._locked = wanted

    def move_to(self, fd: int) -> None:
        """Place the same locks on another descriptor that will take the place of this one."""
        self._place(fd, self._locked)

    def _place(self, fd: int, positions: Iterable[int]) -> bool:
        """False: the file system knows no locks."""
        for start, length in _runs(positions):
            try:
                self._set(fd, _read_lock(), start, length)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    return False
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise self._busy(f"Failed to lock byte {start}") from None
                raise StorageError(
                    f"Failed to lock byte {start}", errno=error.errno, path=self._filename
                ) from None
        return True

    def _release(self, positions: Iterable[int]) -> None:
        """Never fails: what cannot be unlocked is unlocked when the file is closed."""
        import fcntl

        for start, length in _runs(positions):
            with suppress(OSError):
                self._set(self._fd, fcntl.F_UNLCK, start, length)

    def _check_others(self, perm: Perm, unshared: Perm) -> None:
        """Raises Busy where somebody else forbids what is held, or holds what is not shared."""
        for bit, name in NAMES.items():
            if perm & bit and self._is_locked_by_others(UNSHARED_BASE, bit):
                raise self._busy(f'Failed to get "{name}" lock')
        for bit, name in NAMES.items():
            if unshared & bit and self._is_locked_by_others(HELD_BASE, bit):
                raise self._busy(f'Failed to get shared "{name}" lock')

    def _busy(self, message: str) -> Busy:
        return Busy(
            message,
            path=self._filename,
            hint=f"Is another process using the image [{self._filename}]?",
        )

    def _set(self, fd: int, kind: int, start: int, length: int) -> None:
        import fcntl

        command = F_OFD_SETLK if sys.platform == "linux" else fcntl.F_SETLK
        fcntl.fcntl(fd, command, _flock(kind, start, length))

    def _is_locked_by_others(self, base: int, bit: Perm) -> bool:
        import fcntl

        command = F_OFD_GETLK if sys.platform == "linux" else fcntl.F_GETLK
        position = base + int(bit).bit_length() - 1
        answer = fcntl.fcntl(self._fd, command, _flock(fcntl.F_WRLCK, position, 1))
        return bool(_FLOCK.unpack(answer)[_TYPE_FIELD] != fcntl.F_UNLCK)


def _read_lock() -> int:
    import fcntl

    return fcntl.F_RDLCK


def _flock(kind: int, start: int, length: int) -> bytes:
    if sys.platform == "linux":
        return _FLOCK.pack(kind, 0, start, length, 0)
    return _FLOCK.pack(start, length, 0, kind, 0, 0)


def _runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbouring bytes as (start, length): one system call each."""
    runs: list[tuple[int, int]] = []
    for position in sorted(positions):
        if runs and sum(runs[-1]) == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs
