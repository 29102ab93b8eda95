"""The disk that the engine makes of a mapping, seen from outside and from its file."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.engine.batches import layout, rounds
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, Refused, StorageError
from lamina.testing import sample
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

UNIT = 4096
SIZE = 1 << 20


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def make(backing: bytes | None = None, size: int = SIZE, unit: int = UNIT) -> Disk:
    file = MemoryFile()
    sample.create(file, size, unit)
    return reopen(file, backing)


def reopen(file: MemoryFile, backing: bytes | None = None, *, no_flush: bool = False) -> Disk:
    node_options = NodeOptions(read_only=False, unmap=True, no_flush=no_flush)
    below = None if backing is None else MemoryFile(backing, NodeOptions(read_only=True))
    return sample.open_disk(file, backing=below, options=node_options)


def storage(disk: Disk) -> MemoryFile:
    assert isinstance(disk.file, MemoryFile)
    return disk.file


def warnings(disk: Disk) -> list[str]:
    assert isinstance(disk.context, NodesContext)
    return disk.context.warnings


def checked(disk: Disk) -> None:
    """Close, and find neither leaks nor errors."""
    file = storage(disk)
    disk.close()
    assert warnings(disk) == []
    assert sample.check(MemoryFile(file.content)) == (0, [])


def kinds(disk: Disk) -> list[tuple[int, Kind]]:
    return [(extent.length, extent.kind) for extent in disk.extents(0, disk.size)]


# -- reading and writing ---------------------------------------------------------------------------


def test_what_was_written_is_read_after_reopening() -> None:
    disk = make()
    data = pattern(1, 10_000)
    disk.write(12345, data)
    assert disk.read(12345, 10_000) == data
    file = storage(disk)
    checked(disk)
    again = reopen(MemoryFile(file.content))
    assert again.read(12000, 11_000) == bytes(345) + data + bytes(655)
    checked(again)


def test_a_batch_is_one_write_of_the_file() -> None:
    disk = make()
    calls = storage(disk).calls
    before = calls.count("write")
    requests = [(number * 3 * UNIT + 100, pattern(number, 500)) for number in range(50)]
    disk.writev([(offset, memoryview(data)) for offset, data in reversed(requests)])
    assert calls.count("write") == before + 1
    disk.writev(requests)
    assert calls.count("write") == before + 2
    for offset, data in requests:
        assert disk.read(offset, 500) == data
    reads = calls.count("read")
    buffers = [bytearray(500) for _ in requests]
    disk.readv([(offset, memoryview(b)) for (offset, _), b in zip(requests, buffers, strict=True)])
    assert calls.count("read") == reads + 1
    assert buffers == [data for _, data in requests]
    checked(disk)


def test_requests_that_share_a_unit_or_overlap() -> None:
    disk = make(backing=pattern(9, SIZE))
    expected = bytearray(pattern(9, SIZE))
    shared = [(number * 700 + 5, pattern(number, 300)) for number in range(40)]
    disk.writev(shared)
    for offset, data in shared:
        expected[offset : offset + 300] = data
    assert disk.read(0, SIZE) == expected
    adjoining = [(50_000 + number * 1000, pattern(number, 1000)) for number in range(40)]
    disk.writev(adjoining)
    for offset, data in adjoining:
        expected[offset : offset + 1000] = data
    assert disk.read(0, SIZE) == expected
    disk.writev([(200_000, b"a" * 5000), (203_000, b"b" * 5000)])
    found = disk.read(200_000, 8000)
    assert found[:3000] == b"a" * 3000
    assert found[5000:] == b"b" * 3000
    assert set(found[3000:5000]) <= {ord("a"), ord("b")}
    disk.writev([])
    disk.writev([(0, b""), (10, b"")])
    checked(disk)


def test_what_is_empty_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that nobody writes to might lie behind the end of the file."""
    disk = make()

    def reserve(ranges: Any) -> Any:
        raise AssertionError(f"places for {ranges}")

    monkeypatch.setattr(disk.mapping, "reserve", reserve)
    before = bytes(storage(disk).content)
    for offset in (0, UNIT, UNIT + 10, SIZE):
        disk.writev([(offset, b"")])
        disk.write_zeroes(offset, 0)
        disk.discard(offset, 0)
    disk.flush()
    assert storage(disk).content == before
    assert {extent.kind for extent in disk.extents(0, SIZE)} == {Kind.BELOW}
    checked(disk)


def test_rounds_share_no_unit() -> None:
    requests = sorted((random.Random(n).randrange(60_000), b"x" * (n % 900 + 1)) for n in range(90))
    seen = []
    for group in rounds(requests, UNIT):
        seen += group
        for (offset, data), (following, _) in pairwise(group):
            end = offset + len(data)
            assert end <= following
            assert end == following or (end - 1) // UNIT < following // UNIT
    assert sorted(seen) == requests


@pytest.mark.parametrize("length", [SIZE, SIZE // 2, 5000, 0])
def test_copy_on_write_from_a_backing_file_of_any_length(length: int) -> None:
    below = pattern(2, length)
    disk = make(backing=below)
    expected = bytearray(below.ljust(SIZE, b"\0"))
    for offset in (0, 10, UNIT - 1, 5 * UNIT + 7, SIZE // 2 - 100, SIZE - 3):
        disk.write(offset, b"ab")
        expected[offset : offset + 2] = b"ab"
    assert disk.read(0, SIZE) == expected
    file = storage(disk)
    checked(disk)
    assert reopen(MemoryFile(file.content), below).read(0, SIZE) == expected


def test_nothing_is_copied_that_is_known_to_be_zero() -> None:
    disk = make()
    disk.write(100, b"x")
    assert "cow_read" not in storage(disk).events
    disk = make(backing=b"y" * SIZE)
    disk.write(100, b"x")
    assert storage(disk).events.count("cow_read") == 1
    assert storage(disk).events.index("cow_read") < storage(disk).events.index("write_aio")


def test_the_backing_file_does_not_shine_through_behind_the_end() -> None:
    """A longer backing file: the rest of the last unit is not copied, so growing shows zeroes."""
    size = 10 * UNIT + 1000
    disk = make(backing=b"y" * SIZE, size=size)
    disk.write(size - 10, b"end")
    disk.truncate(11 * UNIT)
    assert disk.read(size, UNIT - 1000) == bytes(UNIT - 1000)


def test_what_was_cut_off_does_not_come_back() -> None:
    disk = make()
    disk.write(0, b"z" * 3 * UNIT)
    disk.truncate(UNIT + 100)
    disk.truncate(3 * UNIT, zeroed=True)
    assert disk.read(0, 3 * UNIT) == (b"z" * (UNIT + 100)).ljust(3 * UNIT, b"\0")
    checked(disk)


# -- compressed ------------------------------------------------------------------------------------


def test_compressed_units() -> None:
    disk = make()
    data = b"".join(bytes([n]) * UNIT for n in range(1, 33))
    disk.write_compressed([(0, memoryview(data))])
    assert kinds(disk)[0] == (UNIT, Kind.ENCODED)
    assert disk.read(0, len(data)) == data
    assert disk.read(UNIT - 10, 20) == data[UNIT - 10 : UNIT + 10]
    disk.write(UNIT + 100, b"plain")
    expected = data[: UNIT + 100] + b"plain" + data[UNIT + 105 :]
    assert disk.read(0, len(data)) == expected
    disk.write_compressed([(0, memoryview(data[UNIT : 3 * UNIT]))])
    assert disk.read(0, 2 * UNIT) == data[UNIT : 3 * UNIT]
    checked(disk)


def test_small_reads_of_a_compressed_unit_decode_it_once() -> None:
    disk = make()
    disk.write_compressed([(0, memoryview(b"c" * UNIT))])
    events = storage(disk).events
    for offset in range(0, UNIT, 512):
        assert disk.read(offset, 512) == b"c" * 512
    assert events.count("read_compressed") == 1
    disk.discard(0, UNIT)
    disk.flush()
    disk.write_compressed([(UNIT, memoryview(b"d" * UNIT)), (0, memoryview(b"e" * UNIT))])
    assert disk.read(10, 1) == b"e"
    assert disk.read(UNIT + 10, 1) == b"d"


def test_what_does_not_shrink_is_stored_plain() -> None:
    disk = make()
    noise = pattern(3, UNIT)
    disk.write_compressed([(0, memoryview(noise + b"a" * UNIT))])
    assert kinds(disk)[:2] == [(UNIT, Kind.DATA), (UNIT, Kind.ENCODED)]
    assert disk.read(0, UNIT) == noise
    checked(disk)


def test_compressed_writes_are_whole_units_except_at_the_end() -> None:
    size = 10 * UNIT + 1000
    disk = make(size=size)
    disk.write_compressed([(10 * UNIT, memoryview(b"f" * 1000))])
    assert disk.read(10 * UNIT, 1000) == b"f" * 1000
    for offset, length in ((0, 100), (100, UNIT), (9 * UNIT, 2000)):
        with pytest.raises(StorageError, match="Invalid argument"):
            disk.write_compressed([(offset, memoryview(bytes(length)))])
    checked(disk)


def test_a_damaged_compressed_unit_fails_with_its_place() -> None:
    disk = make()
    disk.write_compressed([(0, memoryview(b"g" * UNIT)), (UNIT, memoryview(b"h" * UNIT))])
    place = disk.extents(0, UNIT)[0].host_offset
    storage(disk).content[place : place + 20] = b"\xff" * 20
    with pytest.raises(ImageCorrupt, match="Input/output error") as caught:
        disk.read(0, 2 * UNIT)
    assert caught.value.offset == place
    assert disk.read(UNIT, 10) == b"h" * 10


# -- zeroes and discards ---------------------------------------------------------------------------


def test_zeroes_by_tables_alone() -> None:
    disk = make(backing=b"y" * SIZE)
    writes = storage(disk).calls.count("write")
    disk.write_zeroes(0, 10 * UNIT)
    assert storage(disk).calls.count("write") == writes
    assert kinds(disk)[0] == (10 * UNIT, Kind.ZERO)
    disk.write_zeroes(20 * UNIT - 100, 2 * UNIT)
    assert disk.read(20 * UNIT - 200, 3 * UNIT) == b"y" * 100 + bytes(2 * UNIT) + b"y" * (
        UNIT - 100
    )
    checked(disk)


def test_a_part_of_a_unit_is_zeroed_as_a_whole_if_the_rest_is_zero() -> None:
    disk = make(backing=b"y" * (UNIT // 2))
    disk.write_zeroes(0, UNIT // 2)
    assert kinds(disk)[0] == (UNIT, Kind.ZERO)
    with pytest.raises(ImageUnsupported):
        make(backing=b"y" * UNIT).write_zeroes(10, 100, WriteFlags.NO_FALLBACK)


def test_storage_zeroes_what_tables_cannot() -> None:
    disk = make(backing=b"y" * SIZE)
    disk.mapping.zero = lambda offset, length, may_unmap: False  # type: ignore[method-assign]
    disk.write(UNIT, b"x" * UNIT)
    file = storage(disk)
    disk.flush()
    file.calls.clear()
    disk.write_zeroes(0, 3 * UNIT)
    disk.write_zeroes(7 * UNIT + 100, 200)
    # Copies around the last one are data; nothing else is.
    assert (file.calls.count("zero"), file.calls.count("write")) == (4, 1)
    assert disk.read(0, 4 * UNIT) == bytes(3 * UNIT) + b"y" * UNIT
    assert disk.read(7 * UNIT, UNIT) == b"y" * 100 + bytes(200) + b"y" * (UNIT - 300)
    checked(disk)


def test_zeroes_over_zeroes_take_no_space() -> None:
    disk = make(backing=b"y" * UNIT)
    disk.mapping.zero = lambda offset, length, may_unmap: False  # type: ignore[method-assign]
    disk.write_zeroes(0, SIZE)
    assert [kind for _, kind in kinds(disk)] == [Kind.DATA, Kind.BELOW]
    checked(disk)


def test_the_end_of_the_disk_is_the_end_of_a_unit() -> None:
    size = 10 * UNIT + 1000
    disk = make(backing=b"y" * size, size=size)
    disk.write_zeroes(0, size, WriteFlags.NO_FALLBACK)
    assert disk.read(0, size) == bytes(size)
    disk.write(0, b"x" * size)
    disk.discard(0, size)
    assert disk.read(0, size) == bytes(size)
    checked(disk)


def test_discards_ignore_parts_of_units() -> None:
    disk = make()
    disk.write(0, b"x" * 4 * UNIT)
    disk.discard(100, 3 * UNIT)
    assert disk.read(0, 4 * UNIT) == b"x" * UNIT + bytes(2 * UNIT) + b"x" * UNIT
    disk.discard(UNIT + 1, 10)
    disk.discard(0, 0)
    checked(disk)


def test_discarded_space_is_used_again_after_a_flush_only() -> None:
    disk = make()
    disk.write(0, b"x" * UNIT)
    disk.flush()
    place = disk.extents(0, UNIT)[0].host_offset
    disk.discard(0, UNIT)
    disk.write(UNIT, b"y" * UNIT)
    assert disk.extents(UNIT, UNIT)[0].host_offset != place
    disk.flush()
    disk.write(2 * UNIT, b"z" * UNIT)
    assert disk.extents(2 * UNIT, UNIT)[0].host_offset == place
    checked(disk)


# -- failures --------------------------------------------------------------------------------------


def failing(disk: Disk, kind: str, at: int = 0) -> None:
    """The ``at``-th request of this kind from now on fails, and only that one."""
    left = [at]

    def hook(what: str, offset: int, length: int) -> None:
        if what == kind:
            left[0] -= 1
            if left[0] == -1:
                raise StorageError.from_errno(28)

    storage(disk).hook = hook


@pytest.mark.parametrize("at", range(4))
def test_a_failed_write_leaves_the_old_content_and_leaks_nothing(at: int) -> None:
    disk = make(backing=b"y" * SIZE)
    failing(disk, "write", at)
    with pytest.raises(StorageError, match="No space left on device"):
        disk.writev([(10, b"a" * 10), (3 * UNIT + 10, b"b" * 10)])
    assert disk.read(0, SIZE) == b"y" * SIZE
    disk.write(10, b"a" * 10)
    checked(disk)


def test_a_failed_read_for_copying_aborts() -> None:
    disk = make(backing=b"y" * SIZE)
    disk.write_compressed([(0, memoryview(b"c" * UNIT))])
    failing(disk, "read")
    with pytest.raises(StorageError):
        disk.write(10, b"a")
    assert disk.read(0, 20) == b"c" * 20
    checked(disk)


def test_a_full_image_fails_before_anything_is_written() -> None:
    file = MemoryFile()
    sample.create(file, SIZE, UNIT, blocks=20)
    # 20 blocks are rounded up to what one block of counts covers.
    disk = reopen(file)
    assert isinstance(disk.mapping, sample.SampleMapping)
    offset, counts, _ = disk.mapping._count(0)
    counts[8:] = b"\1" * (len(counts) - 8)
    disk.mapping.counts.dirty(offset, 8, len(counts) - 8)
    with pytest.raises(StorageError, match="No space left"):
        disk.write(0, b"x" * 20 * UNIT)
    assert disk.read(0, SIZE) == bytes(SIZE)
    disk.write(0, b"x" * UNIT)


def test_a_flush_that_failed_can_be_repeated() -> None:
    disk = make()
    disk.write(0, b"x" * UNIT)
    for kind, at in (("write", 0), ("write", 1), ("write", 2), ("flush", 0), ("flush", 1)):
        disk.write(UNIT, b"q" * 3)
        failing(disk, kind, at)
        try:
            disk.flush()
        except StorageError:
            disk.flush()
        storage(disk).hook = None
    checked(disk)


def test_closing_with_a_broken_file_reports_each_cache() -> None:
    disk = make()
    disk.write(0, b"x")

    def broken(what: str, offset: int, length: int) -> None:
        raise StorageError.from_errno(5)

    storage(disk).hook = broken
    disk.close()
    assert warnings(disk) == [
        "error: Failed to flush the table cache: Input/output error",
        "error: Failed to flush the count cache: Input/output error",
    ]


def test_a_mapping_that_cannot_be_loaded_closes_the_file() -> None:
    file = MemoryFile(b"nothing of the kind".ljust(512))
    with pytest.raises(ImageCorrupt):
        sample.open_disk(file)
    assert file.closed


# -- order of things -------------------------------------------------------------------------------


def test_flush_orders_data_counts_tables_and_roots() -> None:
    disk = make()
    file = storage(disk)
    log: list[str] = []

    def hook(kind: str, offset: int, length: int) -> None:
        if kind != "read":
            log.append(kind)

    file.hook = hook
    disk.write(0, b"x" * UNIT)
    disk.flush()
    # Data; counts; then the table, then the root that names it, each behind a flush.
    assert log == ["write", "write", "flush", "write", "flush", "write", "flush"]
    log.clear()
    disk.write(10, b"in place")
    disk.flush()
    assert log == ["write", "flush"]
    log.clear()
    disk.write(UNIT, b"x" * UNIT)
    disk.flush()
    assert log == ["write", "write", "flush", "write", "flush"]


def test_fua_flushes_and_no_flush_does_not() -> None:
    disk = make()
    flushes = storage(disk).calls.count("flush")
    disk.writev([(0, b"x")], WriteFlags.FUA)
    assert storage(disk).calls.count("flush") > flushes
    file = MemoryFile(storage(disk).content, NodeOptions(read_only=False, no_flush=True))
    careless = reopen(file, no_flush=True)
    file.calls.clear()
    careless.write(5 * UNIT, b"y")
    careless.flush()
    assert "flush" not in file.calls
    assert "write" in file.calls
    assert sample.check(file) == (0, [])


def test_memory_for_metadata_is_bounded_without_any_flush() -> None:
    disk = make(size=64 << 20, unit=512)
    assert disk.metadata.limit == 1 << 16
    for offset in range(0, 32 << 20, 32 << 10):
        disk.write(offset, b"x" * 512)
        assert disk.metadata.dirty_bytes <= (1 << 16) + 4096
    checked(disk)


def test_reopening_read_only_and_back() -> None:
    disk = make()
    disk.write(0, b"x")
    disk.reopen(read_only=True)
    assert sample.check(storage(disk)) == (0, [])
    assert disk.read(0, 1) == b"x"
    disk.reopen(read_only=False)
    disk.write(1, b"y")
    assert disk.read(0, 2) == b"xy"
    checked(disk)


def test_the_gate_opens_once_per_period_of_writing() -> None:
    disk = make()
    calls: list[int] = []
    disk.mapping.before_first_write = lambda: calls.append(1)  # type: ignore[method-assign]
    disk.read(0, 10)
    assert calls == []
    disk.write(0, b"x")
    disk.discard(0, UNIT)
    assert calls == [1]
    disk.reopen(read_only=True)
    disk.reopen(read_only=False)
    disk.write_zeroes(0, UNIT)
    assert calls == [1, 1]


# -- concurrency -----------------------------------------------------------------------------------


class Breakpoint:
    """Suspends the first request that announces ``event``, as blkdebug does."""

    def __init__(self, file: MemoryFile, event: str) -> None:
        self.reached = threading.Event()
        self._resume = threading.Event()
        self._event = event
        file.on_event = self._stop

    def _stop(self, name: str) -> None:
        if name == self._event and not self.reached.is_set():
            self.reached.set()
            assert self._resume.wait(20)

    def resume(self) -> None:
        self._resume.set()


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_suspended_allocation_stops_only_those_that_overlap() -> None:
    disk = make(backing=b"y" * SIZE)
    point = Breakpoint(storage(disk), "write_aio")
    suspended = start(lambda: disk.write(UNIT + 2000, b"a" * 1000))
    assert point.reached.wait(5)
    disk.write(5 * UNIT, b"elsewhere")
    assert disk.read(UNIT, UNIT) == b"y" * UNIT, "reads do not wait and see the old content"
    same_unit = start(lambda: disk.write(UNIT, b"b" * 1000))
    spanning = start(lambda: disk.write(UNIT + 3500, b"c" * 2000))
    zeroing = start(lambda: disk.write_zeroes(0, 4 * UNIT, WriteFlags.NONE))
    time.sleep(0.1)
    assert all(thread.is_alive() for thread in (suspended, same_unit, spanning, zeroing))
    disk.flush()
    point.resume()
    for thread in (suspended, same_unit, spanning, zeroing):
        thread.join(5)
        assert not thread.is_alive()
    assert disk.read(0, 4 * UNIT) == bytes(4 * UNIT), "in the order of arrival"
    checked(disk)


def test_space_is_not_reused_while_a_read_of_it_is_in_flight() -> None:
    disk = make()
    disk.write(0, b"old" * 100)
    disk.flush()
    place = disk.extents(0, 1)[0].host_offset
    point = Breakpoint(storage(disk), "read_aio")
    found: list[bytes] = []
    reader = start(lambda: found.append(disk.read(0, 300)))
    assert point.reached.wait(5)
    disk.discard(0, UNIT)
    disk.flush()
    for unit in range(1, 30):
        disk.write(unit * UNIT, b"new" * 100)
        assert disk.extents(unit * UNIT, 1)[0].host_offset != place
    point.resume()
    reader.join(5)
    assert found == [b"old" * 100]
    disk.flush()
    disk.write(40 * UNIT, b"x")
    assert disk.extents(40 * UNIT, 1)[0].host_offset == place
    checked(disk)


@pytest.mark.parametrize("backed", [False, True])
def test_threads_hammering_one_disk(backed: bool) -> None:
    """Each thread owns every fourth kilobyte: neighbours share all units, and nobody loses."""
    below = pattern(7, SIZE) if backed else None
    disk = make(backing=below)
    expected = bytearray(below or bytes(SIZE))
    owners = 4
    failures: list[BaseException] = []

    def work(owner: int) -> None:
        rng = random.Random(owner)
        try:
            for _ in range(120):
                requests = []
                for block in rng.sample(range(SIZE // 4096), rng.randrange(1, 6)):
                    offset = block * 4096 + owner * 1024
                    requests.append((offset, rng.randbytes(rng.randrange(1, 1024))))
                action = rng.random()
                if action < 0.6:
                    disk.writev(requests)
                elif action < 0.8:
                    for offset, data in requests:
                        disk.write_zeroes(offset, len(data))
                    requests = [(offset, bytes(len(data))) for offset, data in requests]
                elif action < 0.9:
                    disk.flush()
                    requests = []
                for offset, data in requests if action < 0.8 else ():
                    expected[offset : offset + len(data)] = data
                    assert disk.read(offset, len(data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [start(lambda owner=owner: work(owner)) for owner in range(owners)]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert disk.read(0, SIZE) == expected
    file = storage(disk)
    checked(disk)
    assert reopen(MemoryFile(file.content), below).read(0, SIZE) == expected


def test_threads_discarding_and_compressing_whole_units() -> None:
    disk = make()
    failures: list[BaseException] = []
    final: dict[int, bytes] = {}

    def work(owner: int) -> None:
        rng = random.Random(owner)
        try:
            for _ in range(150):
                offset = (rng.randrange(SIZE // UNIT // 4) * 4 + owner) * UNIT
                data = bytes([rng.randrange(1, 256)]) * UNIT
                action = rng.random()
                if action < 0.3:
                    disk.write(offset, data)
                elif action < 0.6:
                    disk.write_compressed([(offset, memoryview(data))])
                else:
                    data = bytes(UNIT)
                    disk.discard(offset, UNIT)
                if action > 0.95:
                    disk.flush()
                final[offset] = data
                assert disk.read(offset, UNIT) == data
        except BaseException as error:
            failures.append(error)

    threads = [start(lambda owner=owner: work(owner)) for owner in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert failures == []
    for offset, data in final.items():
        assert disk.read(offset, UNIT) == data
    checked(disk)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), min_size=1, max_size=20),
    st.sampled_from([16, 21]),
)
def test_layout_agrees_with_sets(parts: list[tuple[int, int]], unit: int) -> None:
    requests = sorted((offset, b"x" * length) for offset, length in parts)
    units, overlapping, sharing = layout(requests, unit)
    touched = {at // unit for offset, data in requests for at in range(offset, offset + len(data))}
    assert {n for start, end in units for n in range(start // unit, end // unit)} == touched
    assert all(one[1] <= two[0] for one, two in pairwise(units))
    taken = [at for offset, data in requests for at in range(offset, offset + len(data))]
    assert overlapping == (len(taken) != len(set(taken)))
    if not overlapping:
        assert sharing == any(
            offset + len(data) < following and (offset + len(data) - 1) // unit == following // unit
            for (offset, data), (following, _) in pairwise(requests)
        )


def test_large_reads_of_compressed_units_use_several_threads() -> None:
    unit = 1 << 16
    disk = make(size=4 << 20, unit=unit)
    data = b"".join(bytes([n + 1, n * 3 & 255]) * (unit // 2) for n in range(48))
    disk.write_compressed([(0, memoryview(data))])
    assert disk.read(100, len(data) - 200) == data[100:-100]
    place = disk.extents(40 * unit, unit)[0].host_offset
    storage(disk).content[place : place + 20] = b"\xff" * 20
    with pytest.raises(ImageCorrupt):
        disk.read(0, len(data))
    assert disk.read(0, 40 * unit) == data[: 40 * unit]


def test_a_mapping_that_refuses_to_be_written_stays_read_only() -> None:
    disk = make()
    disk.reopen(read_only=True)

    def refuse(*, read_only: bool) -> None:
        if not read_only:
            raise Refused("Image is corrupt")

    disk.mapping.reopened = refuse  # type: ignore[method-assign]
    with pytest.raises(Refused):
        disk.reopen(read_only=False)
    assert disk.read_only
    assert storage(disk).read_only
    assert disk.read(0, 10) == bytes(10)


def test_old_reads_are_waited_for_and_new_ones_go_on() -> None:
    disk = make()
    disk.write(0, b"x" * 2 * UNIT)
    disk.flush()
    file = storage(disk)
    reading, go_on, drained = threading.Event(), threading.Event(), threading.Event()

    def wait(kind: str, offset: int, length: int) -> None:
        if kind == "read" and length == UNIT:
            reading.set()
            assert go_on.wait(10)

    file.hook = wait
    old = threading.Thread(target=lambda: disk.read(0, UNIT))
    old.start()
    assert reading.wait(10)

    def drain() -> None:
        with disk.exclusive():
            disk.drain_reads()
        drained.set()

    waiter = threading.Thread(target=drain)
    waiter.start()
    assert disk.read(UNIT, 10) == b"x" * 10
    assert not drained.wait(0.05)
    go_on.set()
    assert drained.wait(10)
    old.join()
    waiter.join()


def test_discards_of_parts_where_the_format_knows_them() -> None:
    disk = make()
    seen: list[tuple[int, int]] = []
    disk.mapping.discard = lambda offset, length: seen.append((offset, length))  # type: ignore[method-assign]
    disk.discard(100, 2 * UNIT)
    disk.mapping.discard_unit = 512
    disk.discard(100, 2 * UNIT)
    assert seen == [(UNIT, UNIT), (512, 2 * UNIT - 512)]
    assert disk.limits.discard_alignment == 512
