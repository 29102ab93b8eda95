"""Metadata reaches storage in stages, with flushes between them and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lamina.block.node import NodeOptions
from lamina.engine.metadata import DirtyWrite, Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import StorageError
from lamina.testing.crash import CrashFile, Step


def make(size: int = 1 << 16, **options: int) -> tuple[CrashFile, Metadata]:
    file = CrashFile(bytes(size))
    return file, Metadata(file, **options)


def journal(file: CrashFile) -> list[int | str]:
    """Offsets of writes, and flushes."""
    return [entry.offset if isinstance(entry, Step) else "flush" for entry in file.journal]


def failing(file: CrashFile, kind: str, times: int = 1) -> None:
    left = [times]

    def hook(what: str, offset: int, length: int) -> None:
        if what == kind and left[0]:
            left[0] -= 1
            raise StorageError.from_errno(5)

    file.hook = hook


def test_stages_are_written_in_order_with_a_flush_between_them() -> None:
    file, metadata = make()
    for number, stage in enumerate(reversed(Stage)):
        metadata.put(stage, number * 1000, b"x")
    metadata.commit()
    assert journal(file) == [4000, "flush", 3000, "flush", 2000, "flush", 1000, "flush", 0]
    assert not metadata.dirty


def test_empty_stages_cost_nothing() -> None:
    file, metadata = make()
    metadata.commit()
    assert file.calls == []
    metadata.put(Stage.TABLES, 10, b"abc")
    metadata.commit()
    assert journal(file) == [10], "no barrier where nothing was written before"
    metadata.put(Stage.ROOTS, 20, b"abc")
    metadata.commit()
    assert journal(file) == [10, "flush", 20], "the root may name the table just written"


def test_one_write_per_stage() -> None:
    file, metadata = make()
    for number in range(100):
        metadata.put(Stage.TABLES, number * 100, b"y")
    metadata.commit()
    assert file.calls == ["write"]


def test_tables_wait_for_the_data_they_name() -> None:
    file, metadata = make()
    other = CrashFile()
    metadata.put(Stage.TABLES, 10, b"abc")
    metadata.data_written(other)
    metadata.commit()
    assert other.calls == ["flush"]
    assert file.calls == ["write"]


def test_later_puts_win_and_merge() -> None:
    file, metadata = make()
    metadata.put(Stage.ROOTS, 100, b"aaaa")
    metadata.put(Stage.ROOTS, 104, b"bbbb")
    metadata.put(Stage.ROOTS, 102, b"cccc")
    metadata.put(Stage.ROOTS, 100, b"d")
    metadata.put(Stage.ROOTS, 90, b"e" * 30)
    metadata.put(Stage.ROOTS, 95, b"f")
    assert metadata.dirty_bytes == 30
    metadata.commit()
    assert file.content[90:120] == b"e" * 5 + b"f" + b"e" * 24
    assert len(file.journal) == 1


def test_puts_are_copies() -> None:
    file, metadata = make()
    data = bytearray(b"before")
    metadata.put(Stage.ROOTS, 0, data)
    data[:] = b"after!"
    metadata.commit()
    assert file.content[:6] == b"before"


def test_forgotten_puts_are_not_written() -> None:
    file, metadata = make()
    metadata.put(Stage.TABLES, 512, b"x" * 8)
    metadata.put(Stage.TABLES, 1024, b"y" * 8)
    metadata.forget(512, 512)
    metadata.commit()
    assert journal(file) == [1024]


def test_events_precede_the_write_of_their_stage() -> None:
    file, metadata = make()
    seen: list[tuple[str, int]] = []
    file.on_event = lambda name: seen.append((name, len(file.journal)))
    metadata.put(Stage.TABLES, 0, b"x", event="l2_update")
    metadata.put(Stage.TABLES, 9, b"x", event="l2_update")
    metadata.put(Stage.ROOTS, 100, b"x", event="l1_update")
    metadata.commit()
    assert seen == [("l2_update", 0), ("l1_update", 3)]


# -- when_durable ----------------------------------------------------------------------------------


def test_space_is_given_back_once_its_last_name_is_gone() -> None:
    file, metadata = make()
    metadata.put(Stage.TABLES, 0, b"x")
    metadata.when_durable(lambda: metadata.put(Stage.FREES, 5000, b"free"))
    metadata.commit()
    assert journal(file) == [0, "flush", 5000]


def test_callbacks_wait_for_older_reads_only() -> None:
    _, metadata = make()
    called: list[str] = []
    old = metadata.pins.enter()
    metadata.when_durable(lambda: called.append("freed"))
    young = metadata.pins.enter()
    metadata.commit()
    assert called == []
    assert metadata.dirty
    metadata.pins.leave(old)
    metadata.commit()
    assert called == ["freed"]
    assert not metadata.dirty
    metadata.pins.leave(young)


def test_callbacks_wait_for_durability() -> None:
    file, metadata = make()
    called: list[str] = []
    metadata.put(Stage.ROOTS, 0, b"x")
    metadata.when_durable(lambda: called.append("freed"))
    failing(file, "flush")
    with pytest.raises(StorageError):
        metadata.commit()
    assert called == []
    metadata.commit()
    assert called == ["freed"]


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_failed_commit_can_be_repeated(kind: str, times: int) -> None:
    file, metadata = make()
    cache = TableCache(metadata, table_bytes=4096, capacity=1 << 16, stage=Stage.TABLES)
    cache.new(8192, bytearray(b"t" * 4096))
    metadata.put(Stage.COUNTS, 100, b"counts")
    metadata.put(Stage.ROOTS, 200, b"roots")
    failing(file, kind, times)
    for _ in range(times):
        with pytest.raises(StorageError):
            metadata.commit()
        assert metadata.dirty
    metadata.commit()
    metadata.barrier()
    assert file.content[100:106] == b"counts"
    assert file.content[8192 : 8192 + 4096] == b"t" * 4096
    assert file.content[200:205] == b"roots"
    assert not metadata.dirty


def test_what_a_failed_flush_may_have_lost_is_written_again() -> None:
    file, metadata = make()
    cache = TableCache(metadata, table_bytes=4096, capacity=1 << 16, stage=Stage.TABLES)
    cache.update(0, 10, b"table")
    metadata.put(Stage.ROOTS, 5000, b"old root")
    failing(file, "flush")
    with pytest.raises(StorageError):
        metadata.commit()
    file.content[:] = bytes(len(file.content))
    metadata.put(Stage.ROOTS, 5000, b"new")
    metadata.commit()
    assert file.content[10:15] == b"table"
    assert file.content[5000:5008] == b"new root"


def test_what_was_flushed_is_not_written_again() -> None:
    file, metadata = make()
    cache = TableCache(metadata, table_bytes=4096, capacity=1 << 16, stage=Stage.TABLES)
    cache.update(0, 10, b"table")
    metadata.commit()
    generation = metadata.generation
    metadata.settle(generation)
    metadata.lost()
    assert not metadata.dirty
    metadata.commit()
    assert len(file.journal) == 1


def test_close_names_the_caches_that_could_not_be_written() -> None:
    file, metadata = make()
    names = ["L2 table cache", "refcount block cache", ""]
    stages = [Stage.TABLES, Stage.COUNTS, Stage.COUNTS]
    caches = [
        TableCache(metadata, table_bytes=512, capacity=4096, stage=stage, name=name)
        for name, stage in zip(names, stages, strict=True)
    ]
    failing(file, "write", 1000)
    assert metadata.close() == [], "nothing to write, nothing to fail"
    caches[0].update(0, 0, b"x")
    failures = metadata.close()
    assert [(name, str(error)) for name, error in failures] == [
        ("L2 table cache", "Input/output error"),
        ("refcount block cache", "Input/output error"),
    ]


# -- lazy counts, bounds ---------------------------------------------------------------------------


def test_lazy_counts_wait_for_a_commit_that_asks_for_them() -> None:
    file, metadata = make()
    metadata.lazy_counts = True
    for number, stage in enumerate(Stage):
        metadata.put(stage, number * 1000, b"x")
    metadata.commit()
    assert journal(file) == [2000, "flush", 3000]
    metadata.commit(counts=True)
    assert journal(file)[3:] == [0, "flush", 1000, "flush", 4000]


def test_relieve_commits_only_above_the_limit() -> None:
    file, metadata = make(limit=1000)
    metadata.put(Stage.TABLES, 0, bytes(1000))
    metadata.relieve()
    assert file.journal == []
    metadata.put(Stage.TABLES, 1000, b"x")
    metadata.relieve()
    assert journal(file) == [0, 1000]


def test_no_flush_is_honoured() -> None:
    file = CrashFile(bytes(8192))
    file.options = NodeOptions(read_only=False, no_flush=True)
    metadata = Metadata(file)
    metadata.put(Stage.COUNTS, 0, b"x")
    metadata.put(Stage.ROOTS, 10, b"x")
    metadata.commit()
    assert journal(file) == [0, 10]


def test_a_callback_that_fails_does_not_stop_the_others_for_good() -> None:
    _, metadata = make()
    called: list[int] = []

    def fail() -> None:
        raise StorageError.from_errno(5)

    metadata.when_durable(lambda: called.append(1))
    metadata.when_durable(fail)
    metadata.when_durable(lambda: called.append(2))
    with pytest.raises(StorageError):
        metadata.commit()
    metadata.commit()
    assert called == [1, 2]


def test_stages_span_all_files_of_an_image() -> None:
    file, metadata = make()
    other = CrashFile(bytes(1 << 16))
    order: list[str] = []

    def watch(name: str, watched: CrashFile) -> None:
        watched.hook = lambda what, offset, length: order.append(f"{name} {what} {offset}")

    watch("file", file)
    watch("other", other)
    tables = TableCache(metadata, table_bytes=512, capacity=4096, stage=Stage.TABLES, node=other)
    tables.new(1024)
    metadata.put(Stage.ROOTS, 7, b"x")
    metadata.put(Stage.ROOTS, 7, b"y", node=other)
    metadata.commit()
    assert order == ["other write 1024", "other flush 0", "file write 7", "other write 7"]
    metadata.put(Stage.FREES, 9, b"z", node=other)
    metadata.forget(9, 1)
    order.clear()
    metadata.commit()
    assert order == ["file flush 0", "other flush 0", "other write 9"]
    metadata.put(Stage.FREES, 9, b"z", node=other)
    metadata.forget(9, 1, node=other)
    assert not metadata.dirty


def test_a_failed_flush_of_one_file_makes_all_dirty_again() -> None:
    file, metadata = make()
    other = CrashFile(bytes(1 << 16))
    metadata.put(Stage.TABLES, 0, b"t", node=other)
    metadata.put(Stage.ROOTS, 0, b"r")
    failing(other, "flush")
    with pytest.raises(StorageError):
        metadata.commit()
    assert metadata.dirty_bytes == 2
    metadata.commit()
    assert journal(other) == [0, "flush", 0, "flush"]
    assert journal(file) == [0]


# -- a log before its targets ----------------------------------------------------------------------


class PlainLog:
    """Writes what it is told to the end of the file, two writes at a time."""

    def __init__(self, file: CrashFile, place: int) -> None:
        self.file = file
        self.place = place
        self.appended: list[list[int]] = []

    def groups(self, writes: Sequence[DirtyWrite]) -> list[list[DirtyWrite]]:
        return [list(writes[start : start + 2]) for start in range(0, len(writes), 2)]

    def append(self, writes: Sequence[DirtyWrite]) -> None:
        self.appended.append([write.host_offset for write in writes])
        self.file.write(self.place, b"".join(bytes(write.data) for write in writes))


def test_a_log_is_durable_before_its_targets_are_written() -> None:
    file, metadata = make()
    metadata.log = PlainLog(file, 50_000)
    metadata.put(Stage.TABLES, 100, b"a")
    metadata.put(Stage.ROOTS, 200, b"b")
    metadata.commit()
    assert journal(file) == [50_000, "flush", 100, "flush", 50_000, "flush", 200]
    assert not metadata.dirty


def test_what_does_not_fit_into_the_log_goes_in_groups() -> None:
    """The log may forget a group when the next one comes: it is in place, durably."""
    file, metadata = make()
    metadata.log = log = PlainLog(file, 50_000)
    metadata.data_written(file)
    for number in range(3):
        metadata.put(Stage.COUNTS, 1000 * number, b"x")
    metadata.commit()
    assert log.appended == [[0, 1000], [2000]]
    first = ["flush", 50_000, "flush", 0, 1000]
    assert journal(file) == [*first, "flush", 50_000, "flush", 2000]


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("after", range(4))
def test_a_failure_at_the_log_leaves_everything_dirty(kind: str, after: int) -> None:
    file, metadata = make()
    metadata.log = PlainLog(file, 50_000)
    metadata.data_written(file)
    for number in range(3):
        metadata.put(Stage.TABLES, 1000 * number, b"x")
    left = [after]

    def hook(what: str, offset: int, length: int) -> None:
        if what == kind:
            left[0] -= 1
            if left[0] < 0:
                raise StorageError.from_errno(5)

    file.hook = hook
    with pytest.raises(StorageError):
        metadata.commit()
    file.hook = None
    assert metadata.dirty_bytes == 3
    metadata.commit()
    assert not metadata.dirty
    assert [file.content[at] for at in (0, 1000, 2000)] == [ord("x")] * 3
