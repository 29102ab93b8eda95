"""Ranges exclude each other where they must, in order of arrival; pins order frees after reads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from lamina.engine.locks import Hold, Pins, Ranges


def make() -> tuple[Ranges, threading.RLock]:
    lock = threading.RLock()
    return Ranges(threading.Condition(lock)), lock


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def finishes(thread: threading.Thread, seconds: float = 5) -> bool:
    thread.join(seconds)
    return not thread.is_alive()


class Waiter:
    """A request in a thread of its own."""

    def __init__(
        self,
        ranges: Ranges,
        lock: threading.RLock,
        spans: list[tuple[int, int]],
        *,
        writing: bool = True,
    ) -> None:
        self.hold: Hold | None = None

        def work() -> None:
            with lock:
                self.hold = ranges.acquire(spans, writing=writing)

        self.thread = in_thread(work)

    def waits(self) -> bool:
        time.sleep(0.05)
        return self.thread.is_alive()


def test_overlapping_requests_wait_and_others_do_not() -> None:
    ranges, lock = make()
    with lock:
        first = ranges.acquire([(0, 100), (300, 400)], writing=True)
    between = Waiter(ranges, lock, [(100, 300)])
    assert finishes(between.thread)
    overlapping = Waiter(ranges, lock, [(350, 450)])
    assert overlapping.waits()
    with lock:
        ranges.release(first)
    assert finishes(overlapping.thread)


def test_writes_in_place_share_but_exclude_a_discard() -> None:
    ranges, lock = make()
    with lock:
        first = ranges.acquire([(0, 100)], writing=True)
        ranges.share(first)
    second = Waiter(ranges, lock, [(0, 100)])
    assert finishes(second.thread)
    discard = Waiter(ranges, lock, [(0, 100)], writing=False)
    assert discard.waits()
    with lock:
        ranges.release(first)
    assert discard.waits()
    with lock:
        assert second.hold is not None
        ranges.release(second.hold)
    assert finishes(discard.thread)


def test_sharing_lets_waiting_writes_pass() -> None:
    ranges, lock = make()
    with lock:
        first = ranges.acquire([(0, 100)], writing=True)
    second = Waiter(ranges, lock, [(50, 60)])
    assert second.waits()
    with lock:
        ranges.share(first)
    assert finishes(second.thread)


def test_nobody_overtakes() -> None:
    ranges, lock = make()
    with lock:
        first = ranges.acquire([(0, 10)], writing=True)
    whole = Waiter(ranges, lock, [(0, 1000)], writing=False)
    assert whole.waits()
    late = Waiter(ranges, lock, [(500, 510)])
    assert late.waits(), "a late comer would starve the request for everything"
    with lock:
        ranges.release(first)
    assert finishes(whole.thread)
    with lock:
        assert whole.hold is not None
        ranges.release(whole.hold)
    assert finishes(late.thread)


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=6).map(
    lambda parts: _sorted_spans(parts)
)


def _sorted_spans(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    end = 0
    for gap, length in parts:
        result.append((end + gap % 7, end + gap % 7 + length))
        end = result[-1][1]
    return result


@given(spans, spans)
def test_overlaps_agrees_with_sets(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    def members(spans: list[tuple[int, int]]) -> set[int]:
        return {at for start, end in spans for at in range(start, end)}

    assert Hold(one).overlaps(two) == bool(members(one) & members(two))


def test_pins() -> None:
    pins = Pins()
    assert pins.oldest == sys.maxsize
    first, second = pins.enter(), pins.enter()
    assert pins.oldest == first < second
    pins.leave(first)
    assert pins.oldest == second
    pins.leave(second)
    assert pins.oldest == sys.maxsize
