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

T = TypeVar("T")


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
    """
    queue: SimpleQueue[_Task[T] | None] = SimpleQueue()
    stopping = False

    def work() -> None:
        while (task := queue.get()) is not None:
            try:
                if not stopping:
                    prepare(task.item)
            except BaseException as error:
                task.error = error
            task.done.release()

    threads: list[threading.Thread] = []
    waiting: deque[_Task[T]] = deque()

    def finish_first() -> None:
        task = waiting.popleft()
        task.done.acquire()
        if task.error is not None:
            raise task.error
        finish(task.item)

    try:
        for item in items:
            task = _Task(item)
            waiting.append(task)
            queue.put(task)
            if len(threads) < workers:
                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                threads.append(thread)
            if len(waiting) >= ahead:
                finish_first()
        while waiting:
            finish_first()
    finally:
        stopping = True
        for _ in threads:
            queue.put(None)
        for thread in threads:
            thread.join()
