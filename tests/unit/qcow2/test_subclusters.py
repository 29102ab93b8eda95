"""Extended L2 entries: what is copied, what is not, and who waits for whom."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lamina.block.driver import Fix
from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import LaminaError, StorageError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.subclusters import ALL, ALL_ZERO, bits_of, parts
from lamina.testing.memory import MemoryFile

from .images import make, open_image, verify

UNIT = 16 << 10
SUB = UNIT // 32
SIZE = 64 * UNIT
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def disk_of(**options: Any) -> Disk:
    content = make(SIZE, cluster_size=UNIT, extended_l2=True, **options)
    below = None
    if "backing_file" in options:
        below = MemoryFile(b"\xbb" * SIZE, NodeOptions(read_only=True))
    return open_image(MemoryFile(content), backing=below, node_options=WRITABLE)


def entries(disk: Disk, count: int) -> list[tuple[bool, int]]:
    """Of the first clusters: whether they have a place, their bitmaps."""
    disk.flush()
    content = bytes(disk.file.content)  # type: ignore[attr-defined]
    header = Header.parse(content)
    at = header.l1_table_offset
    table = int.from_bytes(content[at : at + 8], "big") & (1 << 56) - 1
    words = [
        int.from_bytes(content[table + n : table + n + 8], "big") for n in range(0, count * 16, 8)
    ]
    return [(bool(a & (1 << 56) - 1), b) for a, b in zip(words[::2], words[1::2], strict=True)]


BACKED = {"backing_file": "below", "backing_fmt": "raw"}


def test_units() -> None:
    disk = disk_of()
    assert disk.mapping.unit == SUB
    assert disk.allocation_unit == UNIT
    assert disk.limits.write_zeroes_alignment == SUB
    assert disk.limits.discard_alignment == UNIT
    assert disk.mapping.encoded_unit == UNIT
    assert disk.info().cluster_size == UNIT


def test_runs_of_bits() -> None:
    assert parts(0) == ((0, 32, Kind.BELOW),)
    assert parts(ALL) == ((0, 32, Kind.DATA),)
    assert parts(ALL_ZERO) == ((0, 32, Kind.ZERO),)
    assert parts(0b0110 | 1 << 35) == (
        (0, 1, Kind.BELOW),
        (1, 2, Kind.DATA),
        (3, 1, Kind.ZERO),
        (4, 28, Kind.BELOW),
    )
    assert bits_of(0, 31) == ALL
    assert bits_of(3, 5) == 0b111000


def test_only_edges_of_subclusters_are_copied() -> None:
    disk = disk_of(**BACKED)
    disk.file.calls.clear()  # type: ignore[attr-defined]
    disk.write(UNIT + 5 * SUB + 10, b"x" * SUB)
    assert entries(disk, 2) == [(False, 0), (True, 0b1100000)]
    found = disk.extents(UNIT, UNIT)
    assert [(one.kind, one.length // SUB) for one in found] == [
        (Kind.BELOW, 5),
        (Kind.DATA, 2),
        (Kind.BELOW, 25),
    ]
    # What is reserved says where, though nothing of it is here.
    assert [one.host_offset for one in found] == [
        found[0].host_offset + skip * SUB for skip in (0, 5, 7)
    ]
    expected = bytearray(b"\xbb" * UNIT)
    expected[5 * SUB + 10 : 6 * SUB + 10] = b"x" * SUB
    assert disk.read(UNIT, UNIT) == expected


def test_a_shared_cluster_is_copied_from_its_first_to_its_last_data() -> None:
    disk = disk_of(**BACKED)
    disk.write(4 * SUB, b"a" * SUB)
    disk.write(20 * SUB, b"b" * SUB)
    disk.write_zeroes(30 * SUB, SUB)
    disk.write_zeroes(10 * SUB, SUB)
    features = disk.read(0, UNIT)
    from lamina.block.info import SnapshotInfo

    DRIVER.create_snapshot(disk, SnapshotInfo("", "s", 0, 0, 0, 0, 0))
    disk.write(22 * SUB + 1, b"c")
    assert entries(disk, 1) == [(True, bits_of(4, 22) | 1 << 62)]
    expected = bytearray(features)
    expected[22 * SUB + 1] = ord("c")
    assert disk.read(0, UNIT) == expected
    disk.flush()
    assert verify(bytes(disk.file.content)) == ([], [])  # type: ignore[attr-defined]


def test_zeroes() -> None:
    disk = disk_of(**BACKED)
    disk.write(0, b"d" * 3 * UNIT)
    disk.write_zeroes(2 * SUB + 1, 3 * SUB)  # two whole ones
    disk.write_zeroes(UNIT, UNIT)
    disk.write_zeroes(2 * UNIT, UNIT, WriteFlags.MAY_UNMAP)
    disk.write_zeroes(4 * UNIT - SUB, UNIT + 2 * SUB)
    assert entries(disk, 6) == [
        (True, ALL & ~bits_of(3, 4) | bits_of(3, 4) << 32),
        (True, ALL_ZERO),
        (False, ALL_ZERO),
        (False, 1 << 63),
        (False, ALL_ZERO),
        (False, 1 << 32),
    ]
    assert disk.read(2 * SUB, 4 * SUB) == b"d" + bytes(3 * SUB) + b"d" * (SUB - 1)


def test_a_part_of_a_compressed_cluster_is_zeroed_by_writing() -> None:
    disk = disk_of()
    disk.write_compressed([(0, b"z" * UNIT), (UNIT, b"y" * UNIT)])
    disk.write_zeroes(UNIT - SUB, 2 * SUB)
    assert [bitmap for _, bitmap in entries(disk, 2)] == [ALL, ALL]
    assert disk.read(0, 2 * UNIT) == (
        b"z" * (UNIT - SUB) + bytes(2 * SUB) + b"y" * (UNIT - SUB)
    )
    disk.write_compressed([(0, b"w" * UNIT)])
    assert entries(disk, 1)[0][1] == 0
    disk.discard(0, UNIT)
    assert entries(disk, 1) == [(False, ALL_ZERO)]


def test_two_writers_of_one_new_cluster_share_it() -> None:
    """The second one waits until the first one has published the place, then takes it."""
    disk = disk_of()
    disk.write(10 * UNIT, b"so that there is an L2 table")
    file = disk.file
    assert isinstance(file, MemoryFile)
    started, go_on = threading.Event(), threading.Event()

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "write" and length == SUB and not started.is_set():
            started.set()
            assert go_on.wait(10)

    file.hook = hook
    first = threading.Thread(target=disk.write, args=(0, b"1" * SUB))
    first.start()
    assert started.wait(10)
    second = threading.Thread(target=disk.write, args=(7 * SUB, b"2" * SUB))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    # Elsewhere life goes on.
    disk.write(20 * UNIT, b"3" * SUB)
    go_on.set()
    first.join(10)
    second.join(10)
    file.hook = None
    assert entries(disk, 1) == [(True, 1 | 1 << 7)]
    assert disk.read(0, 8 * SUB) == b"1" * SUB + bytes(6 * SUB) + b"2" * SUB
    disk.flush()
    assert verify(bytes(file.content)) == ([], [])


def test_many_writers() -> None:
    disk = disk_of(**BACKED)
    expected = bytearray(b"\xbb" * SIZE)
    jobs: list[list[tuple[int, bytes]]] = [[] for _ in range(4)]
    for number in range(4 * 64):
        # Each has its own subclusters of clusters that all share.
        data = bytes([number % 250 + 1]) * SUB
        offset = (number * 7 % (32 * 8)) * SUB
        jobs[number % 4].append((offset, data))
        expected[offset : offset + SUB] = data

    def work(own: list[tuple[int, bytes]]) -> None:
        for offset, data in own:
            disk.write(offset, data)

    threads = [threading.Thread(target=work, args=(own,)) for own in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert disk.read(0, SIZE) == expected
    disk.flush()
    assert verify(bytes(disk.file.content)) == ([], [])  # type: ignore[attr-defined]


def test_a_failed_write_changes_nothing_and_leaks_nothing() -> None:
    disk = disk_of(**BACKED)
    disk.write(0, b"first" * 100)
    disk.flush()
    before = entries(disk, 4)
    file = disk.file
    assert isinstance(file, MemoryFile)

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "write" and length >= SUB:
            raise StorageError.from_errno(28)

    file.hook = hook
    with pytest.raises(StorageError):
        disk.write(3 * SUB, b"y" * 3 * UNIT)
    file.hook = None
    assert entries(disk, 4) == before
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


def test_batches_within_one_cluster() -> None:
    disk = disk_of(**BACKED)
    requests = [(n * SUB * 3 + 5, bytes([n + 1]) * 100) for n in range(40)]
    disk.writev([(offset, memoryview(data)) for offset, data in requests])
    disk.writev([(offset + 100, memoryview(data)) for offset, data in requests])
    for offset, data in requests:
        assert disk.read(offset - 1, 202) == b"\xbb" + data * 2 + b"\xbb"


def test_repairs() -> None:
    """A cluster keeps data that can be found, loses bits that mean nothing."""
    disk = disk_of()
    disk.write(0, b"data" * UNIT)
    disk.close()
    content = bytearray(disk.file.content)  # type: ignore[attr-defined]
    header = Header.parse(bytes(content))
    at = header.l1_table_offset
    table = int.from_bytes(content[at : at + 8], "big") & (1 << 56) - 1
    content[table + 8 : table + 16] = (ALL | 1 << 40).to_bytes(8, "big")
    content[table + 16 * 9 + 8 : table + 16 * 9 + 16] = (1 << 5 | 1 << 33).to_bytes(8, "big")
    file = MemoryFile(content)
    damaged = open_image(file, node_options=WRITABLE, check=True)
    lines: list[str] = []
    found = DRIVER.check(damaged, Fix(), lines.append)
    assert found.corruptions == 2
    assert len(lines) == 2
    assert DRIVER.check(damaged, Fix(errors=True), lines.append).corruptions_fixed == 2
    assert damaged.read(0, UNIT) == (b"data" * UNIT)[:UNIT]
    assert entries(damaged, 10)[9] == (False, 1 << 33)
    damaged.close()
    assert verify(bytes(file.content)) == ([], [])


def test_a_contradiction_ends_the_use_of_the_image() -> None:
    disk = disk_of()
    disk.write(0, b"data")
    table = disk.mapping.tables  # type: ignore[attr-defined]
    offset = table.l1[0] & (1 << 56) - 1
    table.cache.update(offset, 8, (1 | 1 << 32).to_bytes(8, "big"))
    with pytest.raises(LaminaError):
        disk.read(0, 1)
    with pytest.raises(LaminaError, match="No medium found"):
        disk.read(UNIT, 1)
