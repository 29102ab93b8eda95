"""Taking space in large pieces while a file grows.

A file system has to think about where to put each write behind the end of a file, and again when it
brings the data to the disk. Asked for the space of many writes at once, it needs a third less time
for all of them. Only a file that is written without gaps gets space ahead: a sparse one stays
sparse. What is left over is given back in the end; after a crash it stays with the file, behind its
end, until somebody sets the file's length.
"""

from __future__ import annotations

import os
from contextlib import suppress

from lamina.protocols.file import allocation

_PATIENCE = 4 << 20
"""Bytes that a file has to grow by, without gaps, before more is expected."""
_AHEAD = 16 << 20


class GrowthAhead:
    """Of one file; called by one thread at a time."""

    def __init__(self) -> None:
        self._grown = 0
        self._reserved = 0
        """Up to where space was taken; 0: none was."""
        self._possible = True

    def prepare(self, fd: int, length: int, start: int, end: int) -> None:
        """A file of this length is about to be written to from ``start`` to ``end``, behind its
        end. Never fails."""
        if start > length:
            self.give_back(fd)
            return
        self._grown += end - length
        if end <= self._reserved or self._grown < _PATIENCE or not self._possible:
            return
        reach = end + _AHEAD
        self._possible = allocation.take(fd, length, reach - length)
        self._reserved = reach  # a failure may have taken a part of it

    def give_back(self, fd: int) -> None:
        """What was taken and not used: from now on it takes patience again to take any.

        Never fails: a file that keeps it is merely large.
        """
        self._grown = 0
        if self._reserved:
            self._reserved = 0
            with suppress(OSError):
                # Setting a length, be it the one that there is, frees what lies behind it.
                os.ftruncate(fd, os.fstat(fd).st_size)
