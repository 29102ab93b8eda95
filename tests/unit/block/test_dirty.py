"""Dirty bitmaps, and the nodes that mark in them."""

from __future__ import annotations

import random
import threading

import pytest

from lamina.block.bitset import Bitset
from lamina.block.dirty import DirtyBitmap, check_new
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.block.tracking import track, untrack
from lamina.errors import ImageCorrupt, LaminaError, StorageError, UsageError
from lamina.testing.memory import MemoryFile

SIZE = (1 << 20) + 1000


def granules(bitmap: DirtyBitmap) -> set[int]:
    found = set()
    for offset, length in bitmap.ranges():
        assert offset % bitmap.granularity == 0
        assert (offset + length) % bitmap.granularity == 0 or offset + length == bitmap.size
        end = -(-(offset + length) // bitmap.granularity)
        found.update(range(offset // bitmap.granularity, end))
    return found


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 1 << 21])
@pytest.mark.parametrize("seed", range(3))
def test_like_a_set_of_granules(granularity: int, seed: int) -> None:
    rng = random.Random(seed)
    bitmap = DirtyBitmap("b", SIZE, granularity)
    model: set[int] = set()
    last = -(-SIZE // granularity)
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([0, 1, 511, 512, 4096, 100_000]), SIZE - offset)
        touched = range(offset // granularity, -(-(offset + length) // granularity))
        match rng.randrange(4):
            case 0 | 1:
                bitmap.mark([(offset, length)])
                model.update(touched if length else ())
            case 2:
                bitmap.set(offset, length)
                model.update(touched if length else ())
            case 3:
                bitmap.reset(offset, length)
                end = (offset + length) // granularity
                if offset + length == SIZE:
                    end = last
                model.difference_update(range(-(-offset // granularity), end))
    assert granules(bitmap) == model
    assert bitmap.dirty_bytes == len(model) * granularity
    bitmap.clear()
    assert list(bitmap.ranges()) == []


def test_a_part_of_the_ranges() -> None:
    bitmap = DirtyBitmap("b", SIZE, 512)
    bitmap.set(1024, 2048)
    bitmap.set(SIZE - 1, 1)
    assert list(bitmap.ranges()) == [(1024, 2048), (SIZE - SIZE % 512, SIZE % 512)]
    assert list(bitmap.ranges(2000, 100)) == [(2000, 100)]
    assert list(bitmap.ranges(0, 1025)) == [(1024, 1)]
    assert list(bitmap.ranges(3072, 1 << 40)) == [(SIZE - SIZE % 512, SIZE % 512)]
    assert list(bitmap.ranges(SIZE, 5)) == []


def test_what_does_not_record() -> None:
    bitmap = DirtyBitmap("b", SIZE, 512, enabled=False)
    bitmap.mark([(0, 512)])
    assert not bitmap.dirty_bytes
    bitmap.enabled = True
    # VM state lies behind the disk.
    bitmap.mark([(1 << 30, 4096), (SIZE, 1)])
    assert not bitmap.dirty_bytes


@pytest.mark.parametrize(("fine", "coarse"), [(512, 512), (512, 65536), (4096, 8192)])
@pytest.mark.parametrize("seed", range(2))
def test_merging_across_granularities(fine: int, coarse: int, seed: int) -> None:
    rng = random.Random(seed)
    for source_size, target_size in ((fine, coarse), (coarse, fine)):
        source = DirtyBitmap("s", SIZE, source_size)
        target = DirtyBitmap("t", SIZE, target_size, enabled=False)
        for bitmap in (source, target):
            for _ in range(10):
                bitmap.set(rng.randrange(SIZE), rng.choice([1, 5000]))
        dirty = {
            byte // 512
            for bitmap in (source, target)
            for offset, length in bitmap.ranges()
            for byte in range(offset, offset + length, 512)
        }
        target.merge(source)
        assert granules(target) == {block * 512 // target_size for block in dirty}
    with pytest.raises(UsageError, match="destination size is 1049576, source size is 5"):
        target.merge(DirtyBitmap("o", 5, 512))
    before = granules(target)
    target.merge(target)
    assert granules(target) == before


def test_merged_into_each_other_at_once() -> None:
    one, two = (DirtyBitmap(name, SIZE, 512) for name in "ab")
    one.set(0, 512)
    two.set(512, 512)
    threads = [
        threading.Thread(target=lambda a=a, b=b: [a.merge(b) for _ in range(300)])
        for a, b in ((one, two), (two, one))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert granules(one) == granules(two) == {0, 1}


def test_resizing() -> None:
    bitmap = DirtyBitmap("b", 10_000, 4096)
    bitmap.set(0, 10_000)
    bitmap.resize(5000)
    assert list(bitmap.ranges()) == [(0, 5000)]
    bitmap.resize(1 << 30)
    # What is new was never written to; the granule at the old end was.
    assert list(bitmap.ranges()) == [(0, 8192)]


def test_bits_are_loaded_when_they_are_needed() -> None:
    loads = []

    def load(bits: Bitset) -> None:
        loads.append(1)
        bits.load(0, b"\x05\xff")

    bitmap = DirtyBitmap("b", 10 * 512, 512, load=load)
    bitmap.mark([(512, 1)])
    assert not loads
    assert bitmap.is_changed
    # Bits behind the end of the disk are none.
    assert granules(bitmap) == {0, 1, 2, 8, 9}
    assert bitmap.dirty_bytes == 5 * 512
    assert loads == [1]
    with bitmap.bits() as bits:
        assert bits.changed == {0}
        bits.changed.clear()
    bitmap.mark([(0, 1024)])
    assert not bitmap.is_changed
    bitmap.not_stored({0})
    assert bitmap.is_changed


def test_bits_that_cannot_be_loaded() -> None:
    def load(bits: Bitset) -> None:
        raise StorageError("Input/output error")

    bitmap = DirtyBitmap("b", SIZE, 512, load=load)
    for _ in range(2):
        with pytest.raises(StorageError):
            list(bitmap.ranges())
    bitmap.mark([(0, 1)])


def test_inconsistent_ones_are_of_no_use() -> None:
    bitmap = DirtyBitmap("b", SIZE, 512, inconsistent=True)
    with pytest.raises(ImageCorrupt, match="is inconsistent and cannot be used") as error:
        bitmap.check_usable()
    assert error.value.hint == "Try block-dirty-bitmap-remove to delete this bitmap from disk"


@pytest.mark.parametrize("granularity", [0, 256, 1000, 1 << 32])
def test_granularities_that_cannot_be(granularity: int) -> None:
    with pytest.raises(UsageError, match="Granularity must be power of 2 and at least 512"):
        check_new("b", granularity)


# -- nodes -----------------------------------------------------------------------------------------


def node() -> MemoryFile:
    return MemoryFile(bytes(SIZE), NodeOptions(read_only=False, unmap=True, filename="memory"))


def test_every_change_is_marked() -> None:
    disk = node()
    bitmaps = [DirtyBitmap("fine", SIZE, 512), DirtyBitmap("coarse", SIZE, 4096)]
    disabled = DirtyBitmap("off", SIZE, 512, enabled=False)
    for bitmap in (*bitmaps, disabled):
        track(disk, bitmap)
    disk.writev([(0, b"x"), (5000, b"yy" * 300)])
    disk.write(20_000, b"z")
    disk.write_zeroes(40_000, 10)
    disk.discard(60_000, 4000)
    disk.writev([(80_000, b"same")], WriteFlags.UNCHANGED)
    disk.write_zeroes(90_000, 10, WriteFlags.UNCHANGED)
    disk.writev([(100_000, b"now")], WriteFlags.FUA)
    touched = [(0, 1), (5000, 600), (20_000, 1), (40_000, 10), (60_000, 4000), (100_000, 3)]
    for bitmap in bitmaps:
        unit = bitmap.granularity
        assert granules(bitmap) == {
            granule
            for offset, length in touched
            for granule in range(offset // unit, (offset + length - 1) // unit + 1)
        }
    assert not disabled.dirty_bytes
    disk.truncate(3000)
    assert [bitmap.size for bitmap in (*bitmaps, disabled)] == [3000] * 3
    assert list(bitmaps[0].ranges()) == [(0, 512)]


def test_a_write_that_failed_is_marked() -> None:
    disk = node()
    bitmap = DirtyBitmap("b", SIZE, 512)
    track(disk, bitmap)

    def fail(kind: str, offset: int, length: int) -> None:
        raise StorageError("Input/output error")

    disk.hook = fail
    with pytest.raises(LaminaError):
        disk.write(1024, b"perhaps")
    assert list(bitmap.ranges()) == [(1024, 512)]


def test_marked_before_and_after() -> None:
    """Who cleans a granule, and reads it while it is written, will look again."""
    disk = node()
    bitmap = DirtyBitmap("b", SIZE, 512)
    track(disk, bitmap)
    seen = []

    def clean(kind: str, offset: int, length: int) -> None:
        seen.append(bitmap.dirty_bytes)
        bitmap.clear()

    disk.hook = clean
    disk.write(0, b"x")
    # Whoever stores the bitmap meanwhile stores this, too.
    assert seen == [512]
    assert bitmap.dirty_bytes == 512


def test_no_trace_is_left() -> None:
    disk = node()
    plain = {name: getattr(disk, name) for name in ("writev", "write_zeroes", "truncate")}
    special = lambda requests: None  # noqa: E731
    disk.__dict__["write_compressed"] = special
    one, two = DirtyBitmap("1", SIZE, 512), DirtyBitmap("2", SIZE, 512)
    track(disk, one)
    track(disk, two)
    untrack(disk, one)
    disk.write(0, b"x")
    assert (one.dirty_bytes, two.dirty_bytes) == (0, 512)
    untrack(disk, two)
    disk.write(1024, b"x")
    assert two.dirty_bytes == 512
    assert {name: getattr(disk, name) for name in plain} == plain
    assert disk.write_compressed is special


def test_many_threads_lose_no_mark() -> None:
    disk = node()
    bitmap = DirtyBitmap("b", SIZE, 512)
    track(disk, bitmap)

    def scribble(start: int) -> None:
        for block in range(start, 2000, 4):
            disk.write(block * 512, b"x")

    threads = [threading.Thread(target=scribble, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(bitmap.ranges()) == [(0, 2000 * 512)]
