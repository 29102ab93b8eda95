"""Who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from lamina.block.alignment import RangeLocks


class Holder:
    """Holds a range in a thread of its own until it is told to let go."""

    def __init__(self, hold: Callable[[], AbstractContextManager[None]]) -> None:
        self.has_it = threading.Event()
        self._let_go = threading.Event()
        self._hold = hold
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._hold():
            self.has_it.set()
            self._let_go.wait(10)

    def waits(self) -> bool:
        return not self.has_it.wait(0.05)

    def goes_on(self) -> bool:
        return self.has_it.wait(10)

    def let_go(self) -> None:
        self._let_go.set()
        self._thread.join(10)


def test_a_request_waits_for_those_under_way_only() -> None:
    locks = RangeLocks()
    head = Holder(lambda: locks.exclusive((0, 10)))
    assert head.goes_on()
    wide = Holder(lambda: locks.exclusive((5, 30)))
    assert wide.waits()
    tail = Holder(lambda: locks.exclusive((20, 30)))
    assert tail.goes_on()
    head.let_go()
    assert wide.waits()
    tail.let_go()
    assert wide.goes_on()
    wide.let_go()


def test_of_those_that_wait_the_first_goes_on() -> None:
    locks = RangeLocks()
    holders = [Holder(lambda: locks.exclusive((0, 10)))]
    assert holders[0].goes_on()
    for _ in range(3):
        holders.append(Holder(lambda: locks.exclusive((0, 10))))
        assert holders[-1].waits()
    for number in range(3):
        holders[number].let_go()
        assert holders[number + 1].goes_on()
        assert all(other.waits() for other in holders[number + 2 :])
    holders[3].let_go()


def test_shared_ranges_exclude_exclusive_ones_only() -> None:
    locks = RangeLocks()
    readers = [Holder(lambda: locks.shared([(0, 10), (40, 50)])) for _ in range(2)]
    assert all(reader.goes_on() for reader in readers)
    writer = Holder(lambda: locks.exclusive((45, 46)))
    assert writer.waits()
    for reader in readers:
        reader.let_go()
    assert writer.goes_on()
    writer.let_go()
