"""Tables in memory: loaded once, bounded while clean, written by the parts that changed."""

from __future__ import annotations

import pytest

from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import RECENT, TableCache, _runs
from lamina.testing.crash import CrashFile, Step

TABLE = 4096 * 4


def make(tables: int = 100, capacity: int = 50) -> tuple[CrashFile, TableCache]:
    content = b"".join(number.to_bytes(2, "little") * (TABLE // 2) for number in range(tables))
    file = CrashFile(content)
    cache = TableCache(
        Metadata(file),
        table_bytes=TABLE,
        capacity=capacity * TABLE,
        stage=Stage.TABLES,
        load_event="l2_load",
        store_event="l2_update",
    )
    return file, cache


def written(file: CrashFile) -> list[tuple[int, int]]:
    return [(s.offset, len(s.data)) for s in file.journal if isinstance(s, Step) and s.data]


def test_a_table_is_read_once() -> None:
    file, cache = make()
    table = cache.get(3 * TABLE)
    assert table[:4] == b"\3\0\3\0"
    assert cache.get(3 * TABLE) is table
    assert file.calls == ["read"]
    assert file.events == ["l2_load"]


def test_tables_may_have_other_lengths_and_end_behind_the_file() -> None:
    _, cache = make(tables=2)
    assert cache.get(TABLE, 100) == b"\1\0" * 50
    assert cache.get(2 * TABLE - 8) == b"\1\0" * 4 + bytes(TABLE - 8)
    assert cache.get(900 * TABLE) == bytes(TABLE)


def test_prefetch_reads_what_is_missing_at_once() -> None:
    file, cache = make()
    cache.get(TABLE)
    cache.prefetch([TABLE, 2 * TABLE, 3 * TABLE, 2 * TABLE])
    assert file.calls == ["read", "read"]
    assert cache.get(3 * TABLE)[0] == 3
    assert len(file.calls) == 2
    cache.prefetch([TABLE])
    assert len(file.calls) == 2


def test_memory_is_bounded_and_the_recently_used_stay() -> None:
    file, cache = make(tables=100, capacity=RECENT + 4)
    for number in range(100):
        cache.get(0)
        cache.get(number * TABLE)
    held = len(file.calls)
    cache.get(0)
    cache.get(99 * TABLE)
    assert len(file.calls) == held
    cache.get(50 * TABLE)
    assert len(file.calls) == held + 1
    assert cache._bytes <= (RECENT + 4) * TABLE
    assert cache._bytes == sum(map(len, cache._tables.values()))


def test_only_changed_parts_are_written() -> None:
    file, cache = make()
    cache.update(TABLE, 4095, b"ab")
    cache.update(TABLE, TABLE - 1, b"z")
    cache.metadata.commit()
    assert written(file) == [(TABLE, 8192), (2 * TABLE - 4096, 4096)]
    assert file.content[TABLE + 4095 : TABLE + 4097] == b"ab"
    assert file.content[2 * TABLE - 1] == ord("z")
    assert file.events == ["l2_load", "l2_update"]


def test_changed_tables_are_never_evicted() -> None:
    _, cache = make(tables=100, capacity=RECENT)
    for number in range(100):
        cache.update(number * TABLE, 0, b"changed")
    assert cache.dirty_bytes == 100 * 4096
    cache.metadata.commit()
    assert cache.dirty_bytes == 0
    # Not before it is certain that they need not be written again.
    assert len(cache._tables) == 100
    cache.metadata.barrier()
    cache.get(101 * TABLE)
    assert len(cache._tables) == RECENT
    for number in range(100):
        assert cache.get(number * TABLE)[:7] == b"changed"


def test_new_tables_are_written_whole() -> None:
    file, cache = make(tables=2)
    cache.new(5 * TABLE)
    cache.new(6 * TABLE, bytearray(b"n" * TABLE))
    cache.metadata.commit()
    assert written(file) == [(5 * TABLE, TABLE), (6 * TABLE, TABLE)]
    assert file.calls == ["write"]


def test_dropped_tables_are_not_written() -> None:
    file, cache = make()
    cache.update(TABLE, 0, b"x")
    cache.update(2 * TABLE, 0, b"y")
    cache.drop(TABLE)
    assert cache.dirty_bytes == 4096
    cache.metadata.commit()
    assert written(file) == [(2 * TABLE, 4096)]
    cache.drop(2 * TABLE)
    cache.metadata.lost()
    assert not cache.metadata.dirty


def test_drop_clean_keeps_changes() -> None:
    file, cache = make()
    cache.update(TABLE, 0, b"changed")
    cache.get(2 * TABLE)
    file.content[2 * TABLE : 2 * TABLE + 5] = b"other"
    cache.drop_clean()
    assert cache.get(TABLE)[:7] == b"changed"
    assert cache.get(2 * TABLE)[:5] == b"other"


def test_a_change_in_another_stage() -> None:
    file, cache = make()
    cache.get(0)[0] = 1
    cache.dirty(0, 0, 1, Stage.FREES)
    cache.update(0, 8192, b"up")
    cache.metadata.commit()
    assert [s.offset if s else "flush" for s in file.journal] == [8192, "flush", 0]


def test_forgotten_tables_cannot_be_marked() -> None:
    _, cache = make()
    with pytest.raises(KeyError, match="is not cached"):
        cache.dirty(0, 0, 1)


def test_runs_of_bits() -> None:
    assert list(_runs(0)) == []
    assert list(_runs(0b1)) == [(0, 1)]
    assert list(_runs(0b1011100)) == [(2, 5), (6, 7)]
    assert list(_runs((1 << 4096) - 1)) == [(0, 4096)]
