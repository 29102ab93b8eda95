"""Where a file has data and where holes, by SEEK_DATA and SEEK_HOLE.

Finding the end of a long stretch of data costs the file system a walk through its extents, so the
last stretch found is remembered: questions that come in small pieces are then answered from it. A
hole is only remembered while nobody else may write, for somebody else's data in it would be missed;
data that has meanwhile become a hole is still told right, as bytes to be read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from lamina.errors import StorageError
from lamina.hints import NamedTuple

_INFINITY = 1 << 63
"""The hole at the end of a file has no end."""


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
            return Region(offset, _INFINITY, False)
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

    def stretches(self, offset: int, end: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, is_data) of everything from ``offset`` to ``end``, in a file of ``length``
        bytes. Neighbours differ: data and holes take turns, so each costs one call."""
        generation = self.generation
        start, stop, is_data = self.region(offset, length)
        start = offset
        while stop < end:
            turn = self._end_of(stop, not is_data, length)
            if turn > stop:
                yield start, stop, is_data
                start, stop, is_data = stop, turn, not is_data
            else:
                # It goes on after all: somebody changes the file while we look. Ask afresh.
                region = self._find(stop, length)
                if region.is_data != is_data:
                    yield start, stop, is_data
                    start, is_data = stop, region.is_data
                stop = region.end
        if is_data or self.exclusive:
            self._known = generation, Region(start, stop, is_data)
        if start < end:
            yield start, end, is_data

    def _end_of(self, offset: int, is_data: bool, length: int) -> int:
        """Where the data or the hole that should begin at ``offset`` ends: there, if none does."""
        if offset >= length:
            return offset if is_data else _INFINITY
        try:
            if is_data:
                return min(os.lseek(self._fd, offset, os.SEEK_HOLE), length)
            found = os.lseek(self._fd, offset, os.SEEK_DATA)
            return found if found < length else _INFINITY
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return offset if is_data else _INFINITY
            raise StorageError.from_os_error(error) from None

    def _find(self, offset: int, length: int) -> Region:
        if not self._supported:
            return Region(offset, length, True)
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return Region(offset, _INFINITY, False)
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                self._supported = False
                return Region(offset, length, True)
            raise StorageError.from_os_error(error) from None
        if data > offset:
            return Region(offset, data if data < length else _INFINITY, False)
        try:
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # cut short by somebody meanwhile
                return Region(offset, length, False)
            raise StorageError.from_os_error(error) from None
        # A hole right here although there was data: somebody punched it in between. Data is right.
        return Region(offset, min(hole, length) if hole > offset else offset + 1, True)
