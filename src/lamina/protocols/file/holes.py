"""Where a file has data and where holes, by SEEK_DATA and SEEK_HOLE.

Finding the end of a long stretch of data costs the file system a walk through its extents, so the
last stretch found is remembered: questions that come in small pieces are then answered from it. A
hole is only remembered while nobody else may write, for somebody else's data in it would be missed;
data that has meanwhile become a hole is still told right, as bytes to be read.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from lamina.errors import StorageError


class Region(NamedTuple):
    start: int
    end: int
    is_data: bool


class HoleMap:
    """The holes of the file open as ``fd``. All figures in bytes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.exclusive = False
        """Nobody else may write to the file."""
        self.generation = 0
        """Whoever changes the file adds one afterwards."""
        self._known: tuple[int, Region] | None = None
        self._supported = hasattr(os, "SEEK_DATA")

    def region(self, offset: int, length: int) -> Region:
        """The stretch around ``offset`` (its start may be cut), in a file of ``length`` bytes."""
        if offset >= length:
            return Region(offset, 1 << 63, False)
        known = self._known
        if known is not None:
            generation, region = known
            if generation == self.generation and region.start <= offset < region.end:
                return region
        # Taken before looking: a change while we look makes what we found worthless.
        generation = self.generation
        region = self._find(offset, length)
        if region.is_data or self.exclusive:
            self._known = generation, region
        return region

    def _find(self, offset: int, length: int) -> Region:
        if not self._supported:
            return Region(offset, length, True)
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return Region(offset, length, False)
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                self._supported = False
                return Region(offset, length, True)
            raise StorageError.from_os_error(error) from None
        if data > offset:
            return Region(offset, min(data, length), False)
        try:
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # cut short by somebody meanwhile
                return Region(offset, length, False)
            raise StorageError.from_os_error(error) from None
        # A hole right here although there was data: somebody punched it in between. Data is right.
        return Region(offset, min(hole, length) if hole > offset else offset + 1, True)
