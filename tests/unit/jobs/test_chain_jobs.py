"""Commit and rebase: jobs that move content along a backing chain."""

from __future__ import annotations

import random

import pytest

from lamina.block.backend import Backend
from lamina.block.permissions import Perm
from lamina.errors import LaminaError
from lamina.jobs.bench import Offsets
from lamina.jobs.bench import Settings as BenchSettings
from lamina.jobs.commit import commit
from lamina.jobs.dd import copy_window
from lamina.jobs.rebase import rebase

from .memory import MemoryDisk
from .test_convert import CompressingDisk, random_disk

K = 1024


def writable(disk: MemoryDisk) -> Backend:
    disk.read_only = False
    return Backend(disk, perm=Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE)


def random_size(chance: random.Random) -> int:
    return chance.randint(1, 300) * 4 * K


@pytest.mark.parametrize("seed", range(15))
def test_after_a_commit_the_base_reads_as_the_top_did(seed: int) -> None:
    chance = random.Random(seed)
    base = random_disk(chance, random_size(chance))
    layers = [base]
    for _ in range(chance.randint(1, 3)):
        layers.append(random_disk(chance, random_size(chance), backing=layers[-1]))
    top = layers[-1]
    content = top.content()
    beyond = base.content()[top.size :]
    # The layers between are left behind: their users are told, in real life, not to use them.
    commit(Backend(top), writable(base))
    assert base.content() == content + beyond
    assert base.flushes == 1


def test_a_commit_writes_only_what_the_overlay_holds() -> None:
    base = MemoryDisk(64 * K, read_only=True)
    base.fill(0, b"b" * 64 * K)
    top = MemoryDisk(128 * K, backing=base)
    top.fill(16 * K, b"t" * 8 * K)
    top.zero(32 * K, 4 * K)
    commit(Backend(top), writable(base))
    assert base.writes == [(16 * K, 8 * K), (32 * K, 4 * K)]
    assert base.size == 128 * K


def test_a_failing_commit_raises_the_bare_error() -> None:
    base = MemoryDisk(64 * K, read_only=True)
    top = MemoryDisk(64 * K, backing=base)
    top.fill(0, b"t" * 64 * K)
    base.fail_write_at = 4 * K
    with pytest.raises(LaminaError, match=r"^No space left on device$"):
        commit(Backend(top), writable(base))


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("unit", [4 * K, 64 * K])
def test_a_disk_reads_the_same_over_its_new_backing_file(seed: int, unit: int) -> None:
    chance = random.Random(seed)
    old = random_disk(chance, random_size(chance))
    for _ in range(chance.randint(0, 2)):
        old = random_disk(chance, random_size(chance), backing=old)
    disk = CompressingDisk(random_size(chance), unit=unit, backing=old)
    for _ in range(5):
        disk.fill(chance.randrange(disk.size // unit + 1) * unit % disk.size, b"")
    new = random_disk(chance, random_size(chance)) if chance.random() < 0.7 else None
    content = disk.content()
    rebase(
        writable(disk), None if new is None else Backend(new), compressed=chance.random() < 0.5
    )
    disk.replace_child("backing", new)
    assert disk.content() == content


def test_only_units_that_differ_are_copied() -> None:
    old, new = MemoryDisk(64 * K, read_only=True), MemoryDisk(128 * K, read_only=True)
    old.fill(0, b"x" * 32 * K)
    new.fill(0, b"x" * 16 * K)
    new.fill(100 * K, b"n" * 4 * K)
    disk = MemoryDisk(128 * K, backing=old)
    disk.fill(20 * K, b"d" * 4 * K)
    rebase(writable(disk), Backend(new))
    # What lies behind the end of the old one was zero.
    assert disk.writes == [(16 * K, 4 * K), (24 * K, 8 * K), (100 * K, 4 * K)]
    disk.replace_child("backing", new)
    assert disk.content() == b"x" * 20 * K + b"d" * 4 * K + b"x" * 8 * K + bytes(96 * K)


def test_a_window_is_copied_whole() -> None:
    source = MemoryDisk(64 * K)
    source.fill(4 * K, b"s" * 8 * K)
    target = MemoryDisk(16 * K)
    target.fill(0, b"\xee" * 16 * K)
    copy_window(Backend(source), 3 * K, 10 * K, writable(target))
    assert target.content() == bytes(K) + b"s" * 8 * K + bytes(K) + b"\xee" * 6 * K


def test_bench_goes_round() -> None:
    offsets = Offsets(10 * K, BenchSettings(offset=8 * K, length=K, step=3 * K))
    assert offsets.take(1) == [8 * K]
    assert offsets.take(5) == [K, 4 * K, 7 * K, 0, 3 * K]
    assert offsets.take(2) == [6 * K, 9 * K]
    assert offsets.take(2) == [2 * K, 5 * K]
