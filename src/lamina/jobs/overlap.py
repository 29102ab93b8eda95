"""Reading, decoding and encoding on several threads, and writing in order.

System calls and codecs let go of the interpreter, so a handful of threads keeps the machine busy.
Each takes an item, prepares it, waits for its turn and finishes it: a buffer stays with one core,
whose cache it fits into, and nothing is handed from thread to thread but the turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter, thread_time

from lamina.engine.workers import threads as cores
from lamina.engine.workers import working_alone
from lamina.hints import Any, TypeVar

T = TypeVar("T")

_TRIAL = 0.003
"""Seconds of work before threads are started: less is not worth it."""
_SAMPLE = 16
"""So many items at first, and one of as many afterwards, tell whether preparing is mostly waiting.
The time that a thread has worked takes long to ask for."""


def overlapped(
    items: Iterable[T],
    prepare: Callable[[T], None],
    finish: Callable[[T], None],
    *,
    workers: int,
) -> None:
    """``prepare(item)`` on up to ``workers`` threads, then ``finish(item)`` in the order of the
    items, one at a time.

    ``items`` is advanced by one thread at a time, never more than ``workers`` items before the one
    that is being finished: so no more than that are in memory, and an item's resources can be
    reused for a later one once it is finished. The first error, in the order of the items, ends
    everything and is raised; no thread is left.
    """
    _Overlap(iter(items), prepare, finish, workers).run()


class _Overlap:
    """Threads are started when they are worth it: as many as there are cores, this one included,
    and all where preparing is mostly waiting, as for a network."""

    def __init__(
        self,
        items: Iterator[Any],
        prepare: Callable[[Any], None],
        finish: Callable[[Any], None],
        workers: int,
    ) -> None:
        self.items = items
        self.prepare = prepare
        self.finish = finish
        self.workers = workers
        self.taking = threading.Lock()
        self.turn = threading.Lock()
        """Held until the item that was taken last is finished."""
        self.threads: list[threading.Thread] = []
        self.error: BaseException | None = None
        self.cores = min(workers, cores())
        self.taken = 0
        """Items."""
        self.sampled = self.waited = 0
        """Items; ``waited``: those of them that took more waiting than work."""

    def run(self) -> None:
        start = perf_counter()
        try:
            while self.step():
                if len(self.threads) < self.workers - 1 and perf_counter() - start > _TRIAL:
                    self.add_threads()
        finally:
            for thread in self.threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def add_threads(self) -> None:
        # Nearly all items do: some always wait, for a core or for the interpreter.
        waits = self.sampled >= _SAMPLE and 10 * self.waited > 9 * self.sampled
        wanted = self.workers if waits else self.cores
        while len(self.threads) < wanted - 1:
            thread = threading.Thread(target=self.work, daemon=True)
            thread.start()
            self.threads.append(thread)

    def work(self) -> None:
        while self.step():
            pass

    def step(self) -> bool:
        """Take an item and see it through; False: there is nothing more to do.

        Whatever happens, the turn is passed on: an error becomes that of everybody when all items
        before it are finished.
        """
        error: BaseException | None = None
        item = None
        with self.taking:
            if self.error is not None:
                return False
            before, after = self.turn, threading.Lock()
            after.acquire()
            try:
                item = next(self.items, None)
            except BaseException as failure:
                error = failure
            if item is None and error is None:
                after.release()
                return False
            self.turn = after
            self.taken += 1
            sampled = self.taken <= _SAMPLE or self.taken % _SAMPLE == 0
        try:
            if error is None:
                self.prepare_alone(item, sampled)
        except BaseException as failure:
            error = failure
        try:
            with before:
                if self.error is None:
                    if error is not None:
                        raise error
                    self.finish(item)
        except BaseException as failure:
            self.error = self.error or failure
        finally:
            after.release()
        return self.error is None

    def prepare_alone(self, item: Any, sampled: bool) -> None:
        start, start_of_thread = (perf_counter(), thread_time()) if sampled else (0.0, 0.0)
        with working_alone():
            self.prepare(item)
        if sampled:
            waited = perf_counter() - start > 2 * (thread_time() - start_of_thread)
            with self.taking:
                self.sampled += 1
                self.waited += waited
