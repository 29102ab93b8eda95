"""Who may touch which guest bytes at the same time.

Requests that change an allocation unit (writes that allocate, zero, discard) are alone on it;
writes into places that exist already share it. Reads take no range at all: a read that resolved an
extent *pins* the state of the tables it saw, and space that lost its name meanwhile is given away
only when no such read is left. A read therefore never waits for a write, nor a discard for a read.
Writes need no pin: what they write to, or copy from, belongs to units that they hold.

Both live under the disk's metadata lock, which is held anyway where they are needed: they cost no
lock of their own. Waiting for a range releases it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

Spans = Sequence[tuple[int, int]]
"""(start, end) of guest bytes, whole units; sorted, without overlaps."""


class Pins:
    """Reads in flight, each with the moment at which it looked at the tables."""

    def __init__(self) -> None:
        self.now = 0
        """Grows with every read."""
        self._active: dict[int, None] = {}

    def enter(self) -> int:
        """Under the disk's lock, before resolving. Returns the token for ``leave``."""
        token = self.now
        self.now = token + 1
        self._active[token] = None
        return token

    def leave(self, token: int) -> None:
        """Any time, with or without the lock: a single operation of a dict."""
        del self._active[token]

    @property
    def oldest(self) -> int:
        """What was recorded as ``now`` up to this value concerns no read in flight."""
        # Only this is asked for under the lock; ``leave`` may run meanwhile, ``enter`` cannot.
        active = list(self._active)
        return min(active) if active else sys.maxsize


class Hold:
    """Ranges that one request holds; ``shared`` once it is known to allocate nothing."""

    __slots__ = ("shared", "spans")

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.shared = False

    def overlaps(self, spans: Spans) -> bool:
        mine = self.spans
        if mine[0][0] >= spans[-1][1] or spans[0][0] >= mine[-1][1]:
            return False
        if len(mine) == 1 and len(spans) == 1:
            return True
        i = j = 0
        while i < len(mine) and j < len(spans):
            if mine[i][1] <= spans[j][0]:
                i += 1
            elif spans[j][1] <= mine[i][0]:
                j += 1
            else:
                return True
        return False


class Ranges:
    """The holds of one disk. All methods are called with the disk's lock held."""

    def __init__(self, released: threading.Condition) -> None:
        """``released``: a condition of the disk's lock."""
        self._released = released
        self._holds: list[Hold] = []
        """In the order of arrival, those that still wait included: nobody overtakes."""
        self._waiting = 0

    def acquire(self, spans: Spans, *, writing: bool) -> Hold:
        """Wait until no earlier request is in the way.

        ``writing``: a write, which may pass earlier requests that turned out to be ``shared``.
        """
        hold = Hold(spans)
        holds = self._holds
        holds.append(hold)
        if len(holds) > 1 and self._blocked(hold, writing):
            self._waiting += 1
            try:
                while self._blocked(hold, writing):
                    self._released.wait()
            except BaseException:
                self.release(hold)
                raise
            finally:
                self._waiting -= 1
        return hold

    def _blocked(self, hold: Hold, writing: bool) -> bool:
        for earlier in self._holds:
            if earlier is hold:
                return False
            if not (writing and earlier.shared) and earlier.overlaps(hold.spans):
                return True
        return False

    def share(self, hold: Hold) -> None:
        """This write allocates nothing: let other writes of that kind pass."""
        hold.shared = True
        if self._waiting:
            self._released.notify_all()

    def release(self, hold: Hold) -> None:
        self._holds.remove(hold)
        if self._waiting:
            self._released.notify_all()
