"""A few threads for codecs, which release the interpreter while they work. Shared by all disks.

Jobs must not wait for other jobs: they compute, nothing else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lamina.hints import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Item = TypeVar("Item")

class _ThisThread(threading.local):
    works_alone = False


_this_thread = _ThisThread()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_owner = 0


def threads() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1


def _executor() -> ThreadPoolExecutor:
    global _pool, _pool_owner
    with _lock:
        # The threads of a pool do not survive a fork.
        if _pool is None or _pool_owner != os.getpid():
            from concurrent.futures import ThreadPoolExecutor

            _pool = ThreadPoolExecutor(max(threads() - 1, 1), "lamina-codec")
            _pool_owner = os.getpid()
        return _pool


@contextmanager
def working_alone() -> Iterator[None]:
    """This thread is one of several that share some work: ``run_all`` gets it no help meanwhile,
    for there would be more threads than cores."""
    _this_thread.works_alone = True
    try:
        yield
    finally:
        _this_thread.works_alone = False


def run_all(
    work: Callable[[Item], object], items: Sequence[Item], *, threads: int = 0
) -> None:
    """Do ``work`` on every item, on several cores; the first error is raised when all are done.

    ``threads``: how many at most; 0: as many as there are cores.
    """
    count = min(threads or _cores(), len(items))
    if count <= 1 or _this_thread.works_alone:
        for item in items:
            work(item)
        return
    pending = iter(items)
    turn = threading.Lock()

    def take_turns() -> None:
        while True:
            with turn:
                item = next(pending, None)
            if item is None:
                return
            work(item)

    helpers = [_executor().submit(take_turns) for _ in range(count - 1)]
    errors = []
    try:
        take_turns()
    except BaseException as error:
        errors.append(error)
    for helper in helpers:
        if not helper.cancel() and (failure := helper.exception()) is not None:
            errors.append(failure)
    if errors:
        raise errors[0]


_cores = threads
