"""Measuring how fast a disk answers requests of one size at a steady stride.

``depth`` requests are under way at a time: they are issued as one batch.
"""

from __future__ import annotations

import time

from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.backend import Backend


_PREPARED = 4096
"""Requests."""


@dataclass(frozen=True)
class Settings:
    count: int = 75000
    """Requests."""
    depth: int = 64
    """Requests that are under way at a time."""
    offset: int = 0
    """Of the first request."""
    length: int = 4096
    """Bytes of a request."""
    step: int = 0
    """From the start of a request to that of the next; 0: ``length``."""
    write: bool = False
    pattern: int = 0
    """The byte that is written."""
    flush_interval: int = 0
    """Flush after so many requests; 0: never."""


def bench(disk: Backend, settings: Settings) -> float:
    """Seconds that it took. Raises what reading and writing raise."""
    buffers = [
        memoryview(bytearray([settings.pattern]) * settings.length)
        for _ in range(min(settings.depth, settings.count))
    ]
    move = disk.writev if settings.write else disk.readv
    offsets = Offsets(disk.size, settings)
    interval = settings.flush_interval
    depth = settings.depth
    left = settings.count
    started = time.perf_counter()
    while left:
        # As many as go between two flushes, or as are worth preparing at once.
        number = min(interval or max(_PREPARED, depth), left)
        some = offsets.take(number)
        if depth == 1:
            buffer = buffers[0]
            for offset in some:
                move([(offset, buffer)])
        else:
            for first in range(0, number, depth):
                move(list(zip(some[first : first + depth], buffers, strict=False)))
        left -= number
        if interval and number == interval:
            disk.flush()
    return time.perf_counter() - started


class Offsets:
    """Where the requests go: on by ``step`` each time, and round from the end of the disk."""

    def __init__(self, size: int, settings: Settings) -> None:
        self._size = size
        self._step = settings.step or settings.length
        self._next = settings.offset

    def take(self, number: int) -> list[int]:
        """The next ones."""
        last = self._next + (number - 1) * self._step
        if last < self._size:
            offsets = list(range(self._next, last + 1, self._step))
        else:
            size = self._size or 1
            offsets = [
                (self._next + index * self._step) % size if index else self._next
                for index in range(number)
            ]
        self._next = (offsets[-1] + self._step) % (self._size or 1)
        return offsets
