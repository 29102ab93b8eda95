"""How many threads a job takes."""

from __future__ import annotations

import hashlib
import threading
import time

from lamina.engine.workers import threads
from lamina.jobs.overlap import overlapped

WORKERS = threads() + 3


def test_all_threads_work_where_preparing_is_waiting() -> None:
    names = set()

    def prepare(number: int) -> None:
        time.sleep(0.005)
        names.add(threading.get_ident())

    overlapped(range(60), prepare, lambda number: None, workers=WORKERS)
    assert len(names) == WORKERS


def test_a_few_long_waits_do_not_start_more_threads_than_there_are_cores() -> None:
    """As where others want the same cores."""
    data = bytes(1 << 18)
    names = set()

    def prepare(number: int) -> None:
        time.sleep(0.02 if number % 16 == 0 else 0)
        hashlib.sha256(data)
        names.add(threading.get_ident())

    overlapped(range(100), prepare, lambda number: None, workers=WORKERS)
    assert len(names) <= threads()
