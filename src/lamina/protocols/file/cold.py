"""Scattered reads of what the host has not in its cache.

One after the other they wait for the storage one after the other, where it could serve many at a
time. So the host is told of all of them before the first is read, and fetches them together. Being
told costs it as much as a read from the cache: it is told only while reads turn out to be slow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from lamina.hints import Any

Run = tuple[int, list[Any], int]
"""Offset, buffers, bytes."""

_FEWEST = 4
"""Runs of a batch that are worth it."""
_SLOW = 40e-6
"""Seconds of a read, on top of ``_PER_BYTE``, that no cache needs."""
_PER_BYTE = 1e-9
_BATCHES = 64
"""How many batches are announced before it is tried without again."""
_NOT_JUDGED = -1.0

_tell: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
_WILL_NEED: int = getattr(os, "POSIX_FADV_WILLNEED", 0)


class ColdReads:
    """The reads of one file. Threads may disagree about how slow it is without harm."""

    def __init__(self) -> None:
        self._announced_batches = 0
        """So many more."""

    def begin(self, fd: int, runs: Sequence[Run]) -> float:
        """Before a batch is read, announce it if that has turned out to be worth it. What this
        returns is for ``end``. Raises OSError."""
        if len(runs) < _FEWEST or _tell is None:
            return _NOT_JUDGED
        if self._announced_batches > 0:
            self._announced_batches -= 1
            for offset, _, length in runs:
                _tell(fd, offset, length, _WILL_NEED)
            return _NOT_JUDGED
        return time.perf_counter()

    def end(self, start: float, runs: Sequence[Run]) -> None:
        """After a batch has been read."""
        if start == _NOT_JUDGED:
            return
        seconds = time.perf_counter() - start - len(runs) * _SLOW
        if seconds > 0 and seconds > sum(run[2] for run in runs) * _PER_BYTE:
            self._announced_batches = _BATCHES
