"""Space for long writes, taken in one piece.

ext4 thinks about each block of a write that goes where nothing was. Asked for the whole range
beforehand, it needs a third less time. Nothing is taken but what is written right away, so a sparse
file stays sparse. Other file systems do not get asked: they look ahead themselves (XFS) or would
not compress what was reserved (Btrfs).
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress

_FILE_SYSTEMS = ("ext4",)
_MOUNTS = "/proc/self/mountinfo"


class SpaceForWrites:
    """Of one file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._helps: bool | None = None
        """None: nobody has asked yet."""

    def take(self, offset: int, length: int) -> bool:
        """Before this range is written, which may be behind the end of the file. Never fails: where
        there is no space, the write will say so. False: the file has all its space already."""
        if self._helps is None:
            self._helps = _helps(self._fd)
        if self._helps:
            state = os.fstat(self._fd)
            if state.st_blocks * 512 >= max(state.st_size, offset + length):
                return False
            with suppress(OSError, OverflowError):
                os.posix_fallocate(self._fd, offset, length)
        return True


def _helps(fd: int) -> bool:
    if sys.platform != "linux":
        return False
    state = os.fstat(fd)
    return stat.S_ISREG(state.st_mode) and _file_system(state.st_dev) in _FILE_SYSTEMS


def _file_system(device: int) -> str:
    """The type of the file system on a device; empty if the host does not say. See proc(5)."""
    number = b"%d:%d" % (os.major(device), os.minor(device))
    with suppress(OSError), open(_MOUNTS, "rb") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == number:
                return os.fsdecode(fields[fields.index(b"-") + 1])
    return ""
