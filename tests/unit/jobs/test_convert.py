from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest

from lamina.block.backend import Backend
from lamina.block.extents import Kind
from lamina.block.node import ReadRequest
from lamina.block.permissions import Perm
from lamina.errors import LaminaError
from lamina.jobs import overlap
from lamina.jobs.convert import Conversion, Settings, convert
from lamina.jobs.rate import RateLimit
from lamina.jobs.sources import Sources
from lamina.jobs.zeroes import between, zero_runs
from lamina.records import replace

from .memory import MemoryDisk

K = 1024


def backend(disk: MemoryDisk) -> Backend:
    perm = Perm.CONSISTENT_READ if disk.read_only else Perm.CONSISTENT_READ | Perm.WRITE
    return Backend(disk, perm=perm)


def random_disk(
    chance: random.Random, size: int, unit: int = 4096, backing: MemoryDisk | None = None
) -> MemoryDisk:
    disk = MemoryDisk(size, unit=unit, backing=backing)
    offset = 0
    while offset < size:
        length = min(chance.choice((1, 2, 7, 40)) * unit, size - offset)
        kind = chance.choice("dnnz")
        if kind == "d":
            disk.fill(offset, chance.choice((bytes(length), chance.randbytes(length))))
        elif kind == "z":
            disk.zero(offset, length)
        offset += length
    disk.read_only = True
    return disk


def dirty_disk(size: int, unit: int = 4096) -> MemoryDisk:
    disk = MemoryDisk(size, unit=unit)
    disk.fill(0, b"\xee" * size)
    return disk


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("unit", [512, 4096, 64 * K])
def test_any_disk_onto_a_dirty_one(seed: int, unit: int) -> None:
    chance = random.Random(seed)
    size = chance.randint(1, 900) * 4 * K + chance.choice((0, 512))
    base = random_disk(chance, chance.randint(1, 900) * 4 * K)
    source = random_disk(chance, size, backing=base)
    target = dirty_disk(size, unit)
    settings = Settings(
        sparse_size=chance.choice((0, 512, 4096, 128 * K)),
        workers=chance.choice((1, 8)),
        any_order=chance.random() < 0.5,
        copy_range=chance.random() < 0.2,
        look_for_zeroes=chance.random() < 0.8,
        salvage=chance.random() < 0.2,
    )
    convert([backend(source)], backend(target), settings)
    assert target.content() == source.content()


def test_several_disks_one_behind_the_other() -> None:
    chance = random.Random(1)
    disks = [random_disk(chance, size) for size in (4 * K, 1536 * K + 512, 700 * K)]
    target = dirty_disk(sum(disk.size for disk in disks))
    convert([backend(disk) for disk in disks], backend(target), Settings())
    assert target.content() == b"".join(disk.content() for disk in disks)


def test_zeroes_are_not_written_to_a_target_that_has_them() -> None:
    source = MemoryDisk(1024 * K)
    source.fill(0, bytes(64 * K) + b"x" * 8 * K + bytes(8 * K) + b"y" * 8 * K + bytes(40 * K))
    target = MemoryDisk(1024 * K)
    convert([backend(source)], backend(target), Settings(target_is_zero=True))
    assert target.writes == [(64 * K, 8 * K), (80 * K, 8 * K)]
    assert target.content() == source.content()


def test_zeroes_count_only_by_the_sparse_size() -> None:
    source = MemoryDisk(128 * K)
    source.fill(0, b"x" * 8 * K + bytes(8 * K) + b"y" * 8 * K + bytes(16 * K) + b"z" * 88 * K)
    target = MemoryDisk(128 * K)
    convert(
        [backend(source)], backend(target), Settings(target_is_zero=True, sparse_size=16 * K)
    )
    assert target.writes == [(0, 24 * K), (40 * K, 88 * K)]


def test_without_a_sparse_size_everything_is_written() -> None:
    source = MemoryDisk(128 * K)
    target = MemoryDisk(128 * K)
    convert([backend(source)], backend(target), Settings(target_is_zero=True, sparse_size=0))
    assert target.state == [Kind.DATA] * 32


def test_over_a_backing_file_only_the_top_layer_is_copied() -> None:
    base = MemoryDisk(256 * K)
    base.fill(0, b"b" * 256 * K)
    base.read_only = True
    source = MemoryDisk(512 * K, backing=base)
    source.fill(64 * K, b"s" * 64 * K)
    source.zero(128 * K, 64 * K)
    target = MemoryDisk(512 * K, backing=base)
    settings = Settings(base=base, zero_from=256 * K)
    convert([backend(source)], backend(target), settings)
    assert target.content() == source.content()
    assert target.writes == [(64 * K, 64 * K), (128 * K, 64 * K)]


def test_an_overlay_onto_a_larger_backing_file_ends_in_zeroes() -> None:
    small = MemoryDisk(64 * K, read_only=True)
    large = MemoryDisk(256 * K, read_only=True)
    for base in (small, large):
        base.fill(0, b"b" * base.size)
    source = MemoryDisk(512 * K, backing=small)
    target = MemoryDisk(512 * K, backing=large)
    settings = Settings(base=small, zero_from=large.size)
    convert([backend(source)], backend(target), settings)
    assert target.content() == source.content()
    assert target.writes == [(64 * K, 192 * K)]


class CompressingDisk(MemoryDisk):
    supports_compressed_writes = True

    def write_compressed(self, requests: object) -> None:
        for offset, data in requests:  # type: ignore[attr-defined]
            assert offset % self.unit == 0
            assert len(data) % self.unit == 0 or offset + len(data) == self.size
        self.writev(requests)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_compressed_writes_are_whole_units(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randint(1, 900) * 4 * K + chance.choice((0, 512))
    disks = [random_disk(chance, size), random_disk(chance, 36 * K)]
    target = CompressingDisk(size + 36 * K, unit=64 * K)
    zero = chance.random() < 0.5
    if not zero:
        target.fill(0, b"\xee" * target.size)
    convert(
        [backend(disk) for disk in disks],
        backend(target),
        Settings(compressed=True, target_is_zero=zero),
    )
    assert target.content() == disks[0].content() + disks[1].content()


class SlowStart(MemoryDisk):
    """Its first bytes take a while once others have been read, so that threads are about."""

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        time.sleep(0.3 if any(offset == 2048 * K for offset, _ in requests) else 0.005)
        super().readv(requests)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("any_order", [True, False])
def test_what_was_read_first_may_be_written_first(
    any_order: bool, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "cores", lambda: 2)
    source = SlowStart(16 << 20, unit=64 * K)
    source.fill(0, b"s" * (16 << 20))
    target = MemoryDisk(16 << 20, unit=64 * K)
    limits = replace(target.limits, in_order=in_order)
    monkeypatch.setattr(MemoryDisk, "limits", limits)
    convert([backend(source)], backend(target), Settings(any_order=any_order))
    assert target.content() == source.content()
    assert (target.writes == sorted(target.writes)) == (in_order or not any_order)


def test_errors_name_the_place_and_leave_no_threads() -> None:
    import threading

    source = MemoryDisk(4096 * K)
    source.fill(0, b"x" * source.size)
    target = MemoryDisk(source.size)
    source.fail_read_at = 2048 * K + 5
    settings = Settings(target_is_zero=True)
    threads = threading.active_count()
    with pytest.raises(LaminaError, match="error while reading at byte 2097152: Input/output"):
        convert([backend(source)], backend(target), settings)
    source.fail_read_at = None
    target.fail_write_at = 1024 * K + 1
    with pytest.raises(LaminaError, match="error while writing at byte 0: No space left"):
        convert([backend(source)], backend(target), settings)
    assert threading.active_count() == threads


def test_salvaged_sectors_are_zeroes_and_warnings() -> None:
    source = MemoryDisk(1024 * K)
    source.fill(0, b"x" * source.size)
    source.fail_read_at = 100 * K + 512
    target = dirty_disk(source.size)
    warnings: list[str] = []
    convert([backend(source)], backend(target), Settings(salvage=True, warn=warnings.append))
    expected = bytearray(b"x" * source.size)
    expected[100 * K + 512 : 101 * K] = bytes(512)
    assert target.content() == expected
    assert warnings == ["error while reading offset 102912: Input/output error"]


def test_a_rate_holds_back() -> None:
    start = time.monotonic()
    limit = RateLimit(10_000_000)
    for _ in range(10):
        limit(200_000)
    assert 0.15 < time.monotonic() - start < 1.0


@pytest.mark.parametrize("seed", range(40))
def test_zero_runs_are_all_the_zero_granules(seed: int) -> None:
    chance = random.Random(seed)
    granule = chance.choice((512, 4096))
    buffer = bytearray(chance.randint(1, 40) * 512 + chance.choice((0, 0, 4, 100)))
    for _ in range(chance.randint(0, 6)):
        buffer[chance.randrange(len(buffer))] = 1
    start = chance.randrange(0, len(buffer), 8)
    phase = chance.randrange(0, 3 * granule, 8)
    expected = bytearray(b"d" * len(buffer))
    edges = [start, *range(start + phase % granule, len(buffer), granule), len(buffer)]
    for one, other in itertools.pairwise(edges):
        if not any(buffer[one:other]):
            expected[one:other] = b"z" * (other - one)
    found = bytearray(b"d" * len(buffer))
    runs = zero_runs(buffer, start, len(buffer), granule, 0, phase)
    for one, other in runs:
        found[one:other] = b"z" * (other - one)
    assert found == expected
    rest = between(runs, start, len(buffer))
    assert sum(b - a for a, b in runs + rest) == len(buffer) - start
    long = zero_runs(buffer, start, len(buffer), granule, 2 * granule, phase)
    everything = runs == [(start, len(buffer))]
    assert long == [run for run in runs if everything or run[1] - run[0] >= 2 * granule]


def test_huge_units_are_written_in_parts() -> None:
    """Whole ones would not fit into memory: some formats have units of gigabytes."""
    unit = 1 << 30
    source = random_disk(random.Random(1), 3 << 20)
    target = MemoryDisk(3 << 20, unit=unit)
    with backend(source) as one, backend(target) as other:
        conversion = Conversion(Sources([one]), other, Settings(target_is_zero=True))
        assert conversion.batch_size == 2 << 20
        conversion.run()
        assert other.read(0, 3 << 20) == one.read(0, 3 << 20)
