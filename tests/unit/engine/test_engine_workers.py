"""Jobs shared by the threads of the pool and the thread that asks."""

from __future__ import annotations

import os
import threading

import pytest

from lamina.engine.workers import run_all


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_done_once(threads: int) -> None:
    done: list[int] = []
    run_all(done.append, range(100), threads=threads)
    assert sorted(done) == list(range(100))
    run_all(done.append, [], threads=threads)
    assert len(done) == 100


def test_several_threads_take_part() -> None:
    both = threading.Barrier(2, timeout=10)
    run_all(lambda _: both.wait(), range(2), threads=2)


def test_the_first_error_is_raised_once_nobody_works_any_more() -> None:
    running: set[int] = set()

    def work(item: int) -> None:
        running.add(item)
        try:
            if item % 10 == 3:
                raise ValueError(item)
        finally:
            running.remove(item)

    with pytest.raises(ValueError):
        run_all(work, range(100), threads=4)
    assert not running


def test_jobs_of_several_threads_at_once() -> None:
    results: list[list[int]] = [[] for _ in range(6)]
    threads = [
        threading.Thread(target=run_all, args=(result.append, range(200)), kwargs={"threads": 3})
        for result in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(sorted(result) == list(range(200)) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_its_own_threads() -> None:
    run_all(lambda _: None, range(4), threads=2)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        run_all(done.append, range(50), threads=3)
        os._exit(0 if sorted(done) == list(range(50)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
