"""Reading, decoding and encoding on threads, while one thread writes in order.

System calls and codecs let go of the interpreter, so a handful of threads keeps the machine busy.
``concurrent.futures`` would do, at ten times the cost per piece.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

from lamina.engine.workers import work_alone

T = TypeVar("T")

_PATIENCE = 4
"""Times that an item was waited for before there is one thread more."""


class _Task(Generic[T]):
    __slots__ = ("done", "error", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


def overlapped(
    items: Iterable[T],
    prepare: Callable[[T], None],
    finish: Callable[[T], None],
    *,
    workers: int,
    ahead: int,
) -> None:
    """``prepare(item)`` on worker threads, then ``finish(item)`` here, in the order of the items.

    ``items`` is advanced here as well, never more than ``ahead`` items before the one that is
    being finished: so no more than that are in memory, and an item's resources can be reused for
    a later one once it is finished. The first error, in the order of the items, ends everything
    and is raised; no thread is left.

    Items are handed over by the handful: waking a thread for each costs more than some of them.
    There is one thread to begin with, and more, up to ``workers``, when it does not keep up.
    """
    queue: SimpleQueue[_Task[T] | None] = SimpleQueue()
    stopping = False

    def work() -> None:
        work_alone()
        while (task := queue.get()) is not None:
            try:
                if not stopping:
                    prepare(task.item)
            except BaseException as error:
                task.error = error
            task.done.release()

    threads: list[threading.Thread] = []
    waiting: deque[_Task[T]] = deque()
    delays = 0

    def add_thread() -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        threads.append(thread)

    def finish_first() -> None:
        nonlocal delays
        task = waiting.popleft()
        if not task.done.acquire(blocking=False):
            delays += 1
            if delays % _PATIENCE == 0 and len(threads) < workers:
                add_thread()
            task.done.acquire()
        if task.error is not None:
            raise task.error
        finish(task.item)

    try:
        add_thread()
        for item in items:
            task = _Task(item)
            waiting.append(task)
            queue.put(task)
            if len(waiting) >= ahead:
                while len(waiting) > ahead // 2:
                    finish_first()
        while waiting:
            finish_first()
    finally:
        stopping = True
        for _ in threads:
            queue.put(None)
        for thread in threads:
            thread.join()
