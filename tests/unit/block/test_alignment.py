"""Requests of any shape made into aligned ones, and who has to wait for whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from lamina.block.alignment import (
    Aligner,
    RangeLocks,
    aligned_buffer,
    check_resizable,
    fragments,
    pieces,
)
from lamina.block.limits import Limits, WriteFlags
from lamina.block.permissions import Perm
from lamina.errors import Refused, StorageError
from lamina.testing.memory import MemoryFile

BLOCK = 4096
SIZE = 16 * BLOCK


class Storage:
    """Takes only what its limits allow, and keeps a record."""

    def __init__(self, **limits: int) -> None:
        self.limits = Limits(request_alignment=BLOCK, **limits)
        self.content = bytearray(b"\xee" * SIZE)
        self.record: list[Any] = []

    def _check(self, offset: int, length: int) -> None:
        assert not (offset | length) % BLOCK, f"{offset}+{length} is not aligned"
        assert length > 0

    def aligned_readv(self, requests: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in requests:
            self._check(offset, len(buffer))
            self._check_length(len(buffer))
            self.record.append(("read", offset, len(buffer)))
            buffer[:] = self.content[offset : offset + len(buffer)]

    def aligned_writev(self, requests: Sequence[tuple[int, Any]], flags: WriteFlags) -> None:
        for offset, data in requests:
            self._check(offset, len(data))
            self._check_length(len(data))
            self.record.append(("write", offset, len(data)))
            self.content[offset : offset + len(data)] = data

    def _check_length(self, length: int) -> None:
        assert length <= (self.limits.max_transfer or length)

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self._check(offset, length)
        assert length <= (self.limits.max_write_zeroes or length)
        self.record.append(("zero", offset, length))
        self.content[offset : offset + length] = bytes(length)

    def aligned_discard(self, offset: int, length: int) -> None:
        self._check(offset, length)
        assert length <= (self.limits.max_discard or length)
        self.record.append(("discard", offset, length))

    def event(self, name: str) -> None:
        self.record.append(name)


def test_aligned_requests_pass_as_they_are() -> None:
    storage = Storage()
    Aligner(storage).writev([(0, b"a" * BLOCK), (BLOCK, b"b" * BLOCK)])
    assert storage.record == [
        "pwritev",
        ("write", 0, BLOCK),
        ("write", BLOCK, BLOCK),
        "pwritev_done",
    ]


def test_a_write_inside_a_block() -> None:
    storage = Storage()
    Aligner(storage).writev([(100, b"x" * 50)])
    assert storage.record == [
        "pwritev_rmw_head",
        "pwritev_rmw_tail",
        ("read", 0, BLOCK),
        "pwritev_rmw_after_head",
        "pwritev_rmw_after_tail",
        "pwritev",
        ("write", 0, BLOCK),
        "pwritev_done",
    ]
    assert storage.content[:200] == b"\xee" * 100 + b"x" * 50 + b"\xee" * 50


def test_a_write_over_several_blocks() -> None:
    storage = Storage()
    Aligner(storage).writev([(100, b"x" * 2 * BLOCK)])
    assert storage.record == [
        "pwritev_rmw_head",
        ("read", 0, BLOCK),
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        ("read", 2 * BLOCK, BLOCK),
        "pwritev_rmw_after_tail",
        "pwritev",
        ("write", 0, 3 * BLOCK),
        "pwritev_done",
    ]


@pytest.mark.parametrize(
    ("offset", "length", "edge"), [(0, BLOCK + 512, "tail"), (512, 2 * BLOCK - 512, "head")]
)
def test_only_crooked_edges_are_read(offset: int, length: int, edge: str) -> None:
    storage = Storage()
    Aligner(storage).writev([(offset, bytes(length))])
    events = [one for one in storage.record if isinstance(one, str)]
    assert events == [f"pwritev_rmw_{edge}", f"pwritev_rmw_after_{edge}", "pwritev", "pwritev_done"]


def test_zeroes_with_crooked_edges() -> None:
    storage = Storage()
    Aligner(storage).write_zeroes(BLOCK - 100, 2 * BLOCK + 200)
    assert storage.record == [
        "pwritev_rmw_head",
        ("read", 0, BLOCK),
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        ("read", 3 * BLOCK, BLOCK),
        "pwritev_rmw_after_tail",
        "pwritev",
        ("write", 0, BLOCK),
        "pwritev_done",
        "pwritev_zero",
        ("zero", BLOCK, 2 * BLOCK),
        "pwritev_done",
        "pwritev",
        ("write", 3 * BLOCK, BLOCK),
        "pwritev_done",
    ]
    expected = b"\xee" * (BLOCK - 100) + bytes(2 * BLOCK + 200) + b"\xee" * (BLOCK - 100)
    assert storage.content[: 4 * BLOCK] == expected


def test_discards_leave_parts_of_blocks_alone() -> None:
    storage = Storage(max_discard=3 * BLOCK, discard_alignment=3 * BLOCK)
    aligner = Aligner(storage)
    aligner.discard(BLOCK + 1, 8 * BLOCK)
    aligner.discard(1, BLOCK)
    assert storage.record == [
        ("discard", 2 * BLOCK, BLOCK),
        ("discard", 3 * BLOCK, 3 * BLOCK),
        ("discard", 6 * BLOCK, 3 * BLOCK),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_random_requests(seed: int) -> None:
    dice = random.Random(seed)
    storage = Storage(
        max_transfer=2 * BLOCK, max_write_zeroes=3 * BLOCK, write_zeroes_alignment=3 * BLOCK
    )
    aligner = Aligner(storage)
    model = bytearray(storage.content)
    for _ in range(300):
        offset = dice.randrange(SIZE)
        length = dice.randrange(min(SIZE - offset, 3 * BLOCK) + 1)
        end = offset + length
        what = dice.choice(("read", "write", "zero"))
        if what == "read":
            found = bytearray(length)
            aligner.readv([(offset, memoryview(found))])
            assert found == model[offset:end]
        elif what == "write":
            data = dice.randbytes(length)
            aligner.writev([(offset, data)])
            model[offset:end] = data
        else:
            aligner.write_zeroes(offset, length)
            model[offset:end] = bytes(length)
        assert storage.content == model


def test_a_failure_lets_go_of_the_range() -> None:
    storage = Storage()
    aligner = Aligner(storage)
    really = storage.aligned_writev

    def fail(*_: object) -> None:
        raise StorageError.from_errno(5)

    storage.aligned_writev = fail  # type: ignore[method-assign, assignment]
    for offset, length in ((0, BLOCK), (100, 10)):
        with pytest.raises(StorageError):
            aligner.writev([(offset, bytes(length))])
    storage.aligned_writev = really  # type: ignore[method-assign]
    aligner.writev([(100, bytes(10))])
    aligner.write_zeroes(0, 2 * BLOCK)


def test_a_batch_and_a_crooked_write_do_not_hang() -> None:
    """The batch wants ranges on both sides of one that somebody else has."""
    storage = Storage()
    aligner = Aligner(storage)

    def batches() -> None:
        for _ in range(200):
            aligner.writev([(at * BLOCK, b"a" * BLOCK) for at in (0, 1, 2, 3)])

    def crooked() -> None:
        for turn in range(200):
            aligner.writev([(turn % 3 * BLOCK + 100, b"b" * BLOCK)])

    threads = [threading.Thread(target=one) for one in (batches, batches, crooked, crooked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_shared_ranges_only_exclude_exclusive_ones() -> None:
    locks = RangeLocks()
    entered: list[str] = []

    def enter(name: str, start: int, end: int, exclusive: bool) -> threading.Thread:
        def work() -> None:
            with locks.exclusive((start, end)) if exclusive else locks.shared([(start, end)]):
                entered.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.05)
        return thread

    with locks.shared([(0, 10), (20, 30)]):
        enter("overlapping", 5, 25, exclusive=False)
        enter("beside", 10, 20, exclusive=True)
        assert entered == ["overlapping", "beside"]
        waiting = enter("over", 9, 11, exclusive=True)
        assert waiting.is_alive()
    waiting.join()
    with locks.exclusive((0, 10)):
        enter("behind", 10, 20, exclusive=False)
        waiting = enter("into", 9, 20, exclusive=False)
        assert waiting.is_alive()
    waiting.join()
    assert entered == ["overlapping", "beside", "over", "behind", "into"]


def test_nobody_waits_for_who_only_waits() -> None:
    """A request that waits for another must not keep a third one from what nobody uses."""
    locks = RangeLocks()
    release = threading.Event()
    entered: list[str] = []
    inside = threading.Semaphore(0)

    def hold(name: str, start: int, end: int) -> threading.Thread:
        def work() -> None:
            with locks.exclusive((start, end)):
                entered.append(name)
                inside.release()
                release.wait(10)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    threads = [hold("left", 0, 10)]
    assert inside.acquire(timeout=10)
    for name, start, end in (("both", 5, 20), ("both again", 5, 20)):
        threads.append(hold(name, start, end))
        threads[-1].join(0.05)
    threads.append(hold("right", 10, 20))
    assert inside.acquire(timeout=10)
    assert entered == ["left", "right"]
    release.set()
    for thread in threads:
        thread.join(10)
    assert entered == ["left", "right", "both", "both again"]


def test_fragments() -> None:
    data = bytes(range(10))
    assert fragments([(0, data)], 0) == [(0, data)]
    found = [(at, bytes(part)) for at, part in fragments([(5, data), (50, b"x")], 4)]
    assert found == [(5, data[:4]), (9, data[4:8]), (13, data[8:]), (50, b"x")]


@pytest.mark.parametrize(
    ("start", "end", "unit", "limit", "expected"),
    [
        (0, 100, 10, 0, [(0, 100)]),
        (5, 65, 15, 30, [(5, 25), (30, 30), (60, 5)]),
        (5, 8, 15, 30, [(5, 3)]),
        (0, 40, 10, 15, [(0, 10), (10, 10), (20, 10), (30, 10)]),
        (7, 7, 10, 10, []),
    ],
)
def test_pieces(
    start: int, end: int, unit: int, limit: int, expected: list[tuple[int, int]]
) -> None:
    assert list(pieces(start, end, unit, limit)) == expected


def test_aligned_buffers_are_reused_but_not_shared() -> None:
    with aligned_buffer(10) as first, aligned_buffer(20) as second:
        first[:] = b"a" * 10
        second[:] = b"b" * 20
        assert bytes(first) == b"a" * 10
        assert len(second) == 20
    with aligned_buffer(2 << 20) as large:
        assert len(large) == 2 << 20


def test_who_writes_the_last_block_must_be_allowed_to_grow() -> None:
    class Coarse(MemoryFile):
        limits = Limits(request_alignment=BLOCK)

    check_resizable(Coarse(bytes(BLOCK)), Perm.WRITE)
    check_resizable(Coarse(bytes(100)), Perm.WRITE | Perm.RESIZE)
    check_resizable(Coarse(bytes(100)), Perm.CONSISTENT_READ)
    with pytest.raises(Refused, match="Cannot get 'write' permission without 'resize'"):
        check_resizable(Coarse(bytes(100)), Perm.WRITE)
