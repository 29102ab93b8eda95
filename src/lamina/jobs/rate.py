"""Holding a job back to so many bytes a second."""

from __future__ import annotations

import time


class RateLimit:
    """Call it with the bytes that were moved; it sleeps when they were too many."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._free_at = time.monotonic()

    def __call__(self, length: int) -> None:
        if not self._rate:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + length / self._rate
        if self._free_at > now:
            time.sleep(self._free_at - now)
