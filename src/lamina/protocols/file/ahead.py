"""Taking space in large pieces while a file grows.

A file system has to think about where to put each write behind the end of a file, and again when it
brings the data to the disk. Asked for the space of many writes at once, it needs a third less time
for all of them. What is left over is given back in the end; after a crash it stays with the file,
behind its end, until somebody sets the file's length.
"""

from __future__ import annotations

import os

from lamina.protocols.file import allocation

_PATIENCE = 4 << 20
"""Bytes that a file has to grow by before more is expected."""
_AHEAD = 16 << 20
_NEVER = 1 << 63


class GrowthAhead:
    def __init__(self) -> None:
        self._grown = 0
        self._reserved = 0
        """Up to where space has been taken."""

    def prepare(self, fd: int, length: int, end: int) -> None:
        """A file of this length is about to be written to up to ``end``. Never fails."""
        self._grown += end - length
        if end <= self._reserved or self._grown < _PATIENCE:
            return
        reach = end + _AHEAD
        self._reserved = reach if allocation.take(fd, length, reach - length) else _NEVER

    def give_back(self, fd: int) -> None:
        """What was taken and not used."""
        if self._reserved not in (0, _NEVER):
            self._reserved = 0
            # Setting a length, be it the one that there is, frees what lies behind it.
            os.ftruncate(fd, os.fstat(fd).st_size)
