"""Rules: which I/O is to fail after which event, and in which state.

A small state machine. Each *event* (a format's name for what it is about to do) is held against the
rules made for it: an ``inject-error`` rule becomes active, a ``set-state`` rule changes the number
that other rules ask for, a breakpoint suspends the request. Active rules make the next I/O of their
kind fail, and stay active until another event makes others active.

Rules that were added later are looked at first, and the first ``set-state`` rule among equals wins.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterable

from lamina.errors import StorageError
from lamina.records import dataclass
from lamina.units import SECTOR

_EVENT_NAMES = """
l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l1_shrink_write_table
l1_shrink_free_l2_clusters l2_load l2_update l2_update_compressed l2_alloc_cow_read l2_alloc_write
read_aio read_backing_aio read_compressed write_aio write_compressed vmstate_load vmstate_save
cow_read cow_write cor_write reftable_load reftable_grow reftable_update refblock_load
refblock_update refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write
refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc
cluster_alloc_bytes cluster_alloc_space cluster_free flush_to_os flush_to_disk pwritev_rmw_head
pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero pwritev_done
empty_image_prepare none
"""
EVENTS = frozenset(_EVENT_NAMES.split())

IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")


@dataclass(frozen=True, eq=False)
class InjectError:
    event: str
    state: int = 0
    """0: any."""
    iotype: str = ""
    """Empty: all but block-status."""
    errno: int = errno.EIO
    sector: int = -1
    """The I/O must touch this sector (512 bytes); -1: any."""
    once: bool = False

    def hits(self, iotype: str, offset: int, length: int) -> bool:
        if self.iotype:
            if self.iotype != iotype:
                return False
        elif iotype == "block-status":
            return False
        return self.sector == -1 or offset <= self.sector * SECTOR < offset + length


@dataclass(frozen=True, eq=False)
class SetState:
    event: str
    state: int = 0
    new_state: int = 0


@dataclass(frozen=True, eq=False)
class Breakpoint:
    event: str
    tag: str
    state: int = 0


Rule = InjectError | SetState | Breakpoint


class Suspended:
    """A request at a breakpoint."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.resumed = False


class Rules:
    """All rules of one node, the state, the active rules and the suspended requests."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._changed = threading.Condition()
        self._state = 1
        self._by_event: dict[str, list[Rule]] = {}
        """In the order in which they are looked at."""
        self._active: list[InjectError] = []
        self._suspended: list[Suspended] = []
        """The latest one first."""
        for rule in rules:
            self._add(rule)

    def _add(self, rule: Rule) -> None:
        self._by_event.setdefault(rule.event, []).insert(0, rule)

    # -- events and errors -----------------------------------------------------------------------

    def happen(self, event: str) -> None:
        """Apply the rules of ``event``; returns when no breakpoint holds this thread any more."""
        if event not in self._by_event:
            return
        with self._changed:
            held = self._apply(event)
            while not all(one.resumed for one in held):
                self._changed.wait()

    def _apply(self, event: str) -> list[Suspended]:
        held: list[Suspended] = []
        injected: list[InjectError] = []
        state = self._state
        for rule in list(self._by_event[event]):
            if rule.state not in (0, state):
                continue
            if isinstance(rule, InjectError):
                injected.insert(0, rule)
            elif isinstance(rule, SetState):
                self._state = rule.new_state
            else:
                self._by_event[event].remove(rule)
                held.append(Suspended(rule.tag))
                _say(f"blkdebug: Suspended request '{rule.tag}'")
        if injected:
            self._active = injected
        self._suspended[:0] = reversed(held)
        if held:
            self._changed.notify_all()
        return held

    def check(self, iotype: str, offset: int, length: int) -> None:
        """Raises the StorageError of the first active rule that this I/O meets."""
        if not self._active:
            return
        with self._changed:
            for rule in self._active:
                if rule.hits(iotype, offset, length):
                    break
            else:
                return
            if rule.once:
                self._active = [one for one in self._active if one is not rule]
                self._by_event[rule.event].remove(rule)
        if rule.errno:
            raise StorageError.from_errno(rule.errno)

    # -- breakpoints -----------------------------------------------------------------------------

    def set_breakpoint(self, event: str, tag: str) -> None:
        """Suspend the next request that meets ``event``. Raises StorageError (ENOENT)."""
        if event not in EVENTS:
            raise StorageError.from_errno(errno.ENOENT)
        with self._changed:
            self._add(Breakpoint(event, tag))

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoints of that name and let go of the requests at them.

        Raises StorageError (ENOENT) if there was neither.
        """
        with self._changed:
            removed = self._forget(tag)
            resumed = False
            while self._resume(tag):
                resumed = True
        if not removed and not resumed:
            raise StorageError.from_errno(errno.ENOENT)

    def _forget(self, tag: str) -> bool:
        found = False
        for rules in self._by_event.values():
            for rule in list(rules):
                if isinstance(rule, Breakpoint) and rule.tag == tag:
                    rules.remove(rule)
                    found = True
        return found

    def resume(self, tag: str) -> None:
        """Let go of the latest request suspended under ``tag``. Raises StorageError (ENOENT)."""
        with self._changed:
            if not self._resume(tag):
                raise StorageError.from_errno(errno.ENOENT)

    def _resume(self, tag: str) -> bool:
        for one in self._suspended:
            if one.tag == tag:
                _say(f"blkdebug: Resuming request '{tag}'")
                self._suspended.remove(one)
                one.resumed = True
                self._changed.notify_all()
                return True
        return False

    def resume_all(self) -> None:
        """Nobody waits for ever on a node that is being closed."""
        with self._changed:
            for one in self._suspended:
                one.resumed = True
            self._suspended.clear()
            self._changed.notify_all()

    def is_suspended(self, tag: str) -> bool:
        with self._changed:
            return any(one.tag == tag for one in self._suspended)

    def wait_suspended(self, tag: str, timeout: float | None = None) -> bool:
        """Wait (seconds) until a request is suspended under ``tag``; False: in vain."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(one.tag == tag for one in self._suspended), timeout
            )


def _say(line: str) -> None:
    """In one piece, as other threads may be printing too."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
