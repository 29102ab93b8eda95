"""What changes in a qcow2 file when its disk is written to: places, bits, order, announcements."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest

from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.mapping import Qcow2Mapping
from lamina.testing.memory import MemoryFile

from .images import make, open_image, read_only, verify

KIB = 1 << 10
UNIT = 4 * KIB
SIZE = 1 << 20
COPIED = 1 << 63
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def new(
    *, size: int = SIZE, backing: bytes | None = None, runtime: dict[str, str] | None = None,
    **options: Any,
) -> tuple[MemoryFile, Disk]:
    options.setdefault("cluster_size", UNIT)
    if backing is not None:
        options |= {"backing_file": "below", "backing_fmt": "raw"}
    file = MemoryFile(make(size, **options))
    below = None if backing is None else read_only(backing)
    disk = open_image(file, backing=below, node_options=WRITABLE, **(runtime or {}))
    return file, disk


def mapping_of(disk: Node) -> Qcow2Mapping:
    assert isinstance(disk, Disk)
    assert isinstance(disk.mapping, Qcow2Mapping)
    return disk.mapping


def entries(file: MemoryFile, first: int, count: int) -> list[int]:
    """L2 entries of guest clusters, as they are in the file."""
    header = Header.parse(bytes(file.content))
    found = []
    for cluster in range(first, first + count):
        l1_index, index = divmod(cluster, header.l2_entries)
        (l1_entry,) = struct.unpack_from(">Q", file.content, header.l1_table_offset + 8 * l1_index)
        table = l1_entry & ~COPIED
        found.append(
            struct.unpack_from(">Q", file.content, table + 8 * index)[0] if table else 0
        )
    return found


def calls_of(file: MemoryFile) -> list[tuple[str, int, int]]:
    """Hear every request from now on."""
    calls: list[tuple[str, int, int]] = []
    file.hook = lambda kind, offset, length: calls.append((kind, offset, length))
    return calls


# -- where things go -------------------------------------------------------------------------------


def test_sequential_writes_lie_one_behind_the_other() -> None:
    file, disk = new()
    for number in range(40):
        disk.write(number * UNIT, b"x" * UNIT)
    disk.close()
    # Header, refcount table, refcount block, L1 table, L2 table.
    assert entries(file, 0, 40) == [COPIED | (5 + number) * UNIT for number in range(40)]


def test_gaps_are_filled_by_single_clusters_and_passed_by_runs() -> None:
    file, disk = new()
    disk.write(0, b"x" * 10 * UNIT)
    disk.discard(2 * UNIT, UNIT)
    disk.discard(5 * UNIT, UNIT)
    disk.flush()
    disk.write(20 * UNIT, b"y" * 3 * UNIT)
    disk.write(30 * UNIT, b"z" * UNIT)
    disk.write(31 * UNIT, b"z" * UNIT)
    disk.close()
    assert entries(file, 20, 3) == [COPIED | place * UNIT for place in (15, 16, 17)]
    assert entries(file, 30, 2) == [COPIED | place * UNIT for place in (7, 10)]


def test_a_run_stays_whole_across_refcount_blocks() -> None:
    """The new block comes to lie behind the run, and a single cluster behind its new block."""
    file, disk = new(cluster_size=512, refcount_bits=16)
    disk.write(0, b"x" * 512 * 124)
    disk.write(512 * 124, b"y" * 512 * 248)
    disk.flush()
    header = Header.parse(bytes(file.content))
    blocks = struct.unpack_from(">3Q", file.content, header.refcount_table_offset)
    data = [entry & ~COPIED for entry in entries(file, 124, 248)]
    ends = [place for place, after in itertools.pairwise(data) if after != place + 512]
    # Runs end where another L2 table begins, not where a refcount block is missing.
    assert len(ends) <= 4
    assert blocks[1] not in data
    assert blocks[1] > 256 * 512
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


def test_compressed_clusters_share_host_clusters() -> None:
    file, disk = new(refcount_bits=8)
    for number in range(12):
        disk.write_compressed([(number * UNIT, memoryview(bytes([number]) * UNIT))])
    disk.close()
    assert len(file.content) <= 7 * UNIT
    assert verify(bytes(file.content)) == ([], [])
    places = [entry & (1 << 58) - 1 for entry in entries(file, 0, 12)]
    assert places == sorted(places)
    assert len({place // UNIT for place in places}) < 3


def test_one_bit_of_refcount_shares_nothing() -> None:
    file, disk = new(refcount_bits=1)
    for number in range(3):
        disk.write_compressed([(number * UNIT, memoryview(bytes([number]) * UNIT))])
    disk.close()
    places = [entry & (1 << 58) - 1 for entry in entries(file, 0, 3)]
    assert [place % UNIT for place in places] == [0, 0, 0]
    assert verify(bytes(file.content)) == ([], [])


def test_preallocated_zeroes_keep_their_place() -> None:
    file, disk = new()
    disk.write(0, b"x" * 4 * UNIT)
    disk.write_zeroes(0, 4 * UNIT)
    disk.flush()
    assert entries(file, 0, 4) == [COPIED | (5 + number) * UNIT | 1 for number in range(4)]
    disk.write(UNIT + 7, b"new")
    disk.flush()
    assert entries(file, 1, 1) == [COPIED | 6 * UNIT]
    assert disk.read(UNIT, UNIT) == bytes(7) + b"new" + bytes(UNIT - 10)
    assert disk.read(0, UNIT) == bytes(UNIT)


def test_zeroes_behind_the_end_are_not_written() -> None:
    file, disk = new(cluster_size=64 * KIB)
    disk.write(0, b"x")
    calls = calls_of(file)
    disk.write(10 * 64 * KIB + 5000, b"y" * 100)
    assert [(kind, length) for kind, _, length in calls] == [("write", 100)]


# -- zero and discard: the table of the specification ----------------------------------------------

DATA = COPIED | 5 * UNIT


@pytest.mark.parametrize(
    ("compat", "backed", "action", "expected"),
    [
        ("1.1", False, "discard", 1),
        ("1.1", True, "discard", 1),
        ("1.1", True, "zero", DATA | 1),
        ("1.1", False, "zero", DATA | 1),
        ("1.1", False, "unmap", 1),
        ("0.10", False, "discard", 0),
        ("0.10", False, "zero", 0),
        ("0.10", False, "unmap", 0),
        ("0.10", True, "discard", DATA),
        ("0.10", True, "zero", DATA),
        ("0.10", True, "unmap", DATA),
        ("keep", True, "discard", DATA | 1),
        ("keep", False, "unmap", DATA | 1),
    ],
)
def test_what_becomes_of_an_allocated_cluster(
    compat: str, backed: bool, action: str, expected: int
) -> None:
    backing = b"\7" * SIZE if backed else None
    runtime = {"discard_no_unref": "on"} if compat == "keep" else {}
    file, disk = new(
        compat="1.1" if compat == "keep" else compat, backing=backing, runtime=runtime
    )
    disk.write(0, b"x" * UNIT)
    if action == "discard":
        disk.discard(0, UNIT)
    else:
        flags = WriteFlags.MAY_UNMAP if action == "unmap" else WriteFlags.NONE
        disk.write_zeroes(0, UNIT, flags)
    kept = action == "discard" and expected == DATA
    assert disk.read(0, UNIT) == (b"x" * UNIT if kept else bytes(UNIT))
    disk.close()
    assert entries(file, 0, 1) == [expected]
    assert verify(bytes(file.content)) == ([], [])


@pytest.mark.parametrize(("backed", "expected"), [(True, 1), (False, 0)])
def test_discard_hides_a_backing_file(backed: bool, expected: int) -> None:
    file, disk = new(backing=b"\7" * SIZE if backed else None)
    disk.discard(0, UNIT)
    disk.discard(2 * UNIT + 1, UNIT)
    disk.flush()
    assert entries(file, 0, 4) == [expected, 0, 0, 0]


# -- discards that go on to the file ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "unmap", "expected"),
    [
        ({}, True, [("discard", 5 * UNIT, 3 * UNIT)]),
        ({}, False, []),
        ({"pass_discard_request": "off"}, True, []),
        ({"discard_no_unref": "on"}, True, [("discard", 5 * UNIT, 3 * UNIT)]),
    ],
)
def test_requests_are_passed_on(
    runtime: dict[str, str], unmap: bool, expected: list[tuple[str, int, int]]
) -> None:
    content = make(SIZE, cluster_size=UNIT)
    file = MemoryFile(content, WRITABLE)
    options = NodeOptions(read_only=False, unmap=unmap, filename="memory")
    disk = open_image(file, node_options=options, **runtime)
    disk.write(0, b"x" * 3 * UNIT)
    disk.flush()
    calls = calls_of(file)
    # With discards ignored, only the node itself would do something.
    disk._discard(0, 3 * UNIT)
    assert "discard" not in [kind for kind, _, _ in calls], "before the tables are durable"
    disk.flush()
    assert [call for call in calls if call[0] == "discard"] == expected


def test_other_frees_are_passed_on_when_wanted() -> None:
    for wanted in ("on", "off"):
        file = MemoryFile(make(SIZE, cluster_size=UNIT), WRITABLE)
        disk = open_image(file, node_options=WRITABLE, pass_discard_other=wanted)
        disk.write_compressed([(0, memoryview(b"c" * UNIT))])
        disk.flush()
        calls = calls_of(file)
        disk.write(0, b"plain")
        disk.flush()
        assert ("discard" in [kind for kind, _, _ in calls]) == (wanted == "on")


# -- bits of the header ----------------------------------------------------------------------------


def features(file: MemoryFile) -> tuple[int, int, int]:
    incompatible, compatible, autoclear = struct.unpack_from(">QQQ", file.content, 72)
    return incompatible, compatible, autoclear


def test_lazy_refcounts_make_the_image_dirty_until_it_is_closed() -> None:
    file, disk = new(lazy_refcounts=True)
    assert features(file) == (0, 1, 0)
    assert disk.read(0, 10) == bytes(10)
    assert features(file) == (0, 1, 0)
    disk.write(0, b"x" * 3 * UNIT)
    disk.flush()
    assert features(file) == (1, 1, 0)
    assert verify(bytes(file.content)).errors, "counts are late"
    disk.close()
    assert features(file) == (0, 1, 0)
    assert verify(bytes(file.content)) == ([], [])


@pytest.mark.parametrize(("wanted", "created"), [("on", False), ("off", True)])
def test_the_option_decides_about_laziness(wanted: str, created: bool) -> None:
    file, disk = new(lazy_refcounts=created, runtime={"lazy_refcounts": wanted})
    disk.write(0, b"x")
    disk.flush()
    assert features(file)[0] == (1 if wanted == "on" else 0)


def test_unknown_autoclear_bits_go_with_the_first_write() -> None:
    content = bytearray(make(SIZE, cluster_size=UNIT))
    content[88:96] = (1 << 50 | 2).to_bytes(8, "big")
    content[80:88] = (1 << 51).to_bytes(8, "big")
    file = MemoryFile(content)
    disk = open_image(file, node_options=WRITABLE)
    disk.read(0, 10)
    assert features(file) == (0, 1 << 51, 1 << 50 | 2)
    disk.write(0, b"x")
    assert features(file) == (0, 1 << 51, 2)


def test_a_new_backing_file_keeps_everything_else() -> None:
    content = make(SIZE, cluster_size=UNIT)
    header = Header.parse(content)
    header.unknown_extensions = [(0x77777777, b"not ours")]
    header.compatible_features = 1 << 40
    file = MemoryFile(header.pack().ljust(UNIT, b"\0") + content[UNIT:])
    disk = open_image(file, node_options=WRITABLE)
    disk.write(0, b"x")
    DRIVER.change_backing_file(disk, "somewhere/else.raw", "raw")
    found = Header.parse(bytes(file.content))
    assert (found.backing_file, found.backing_format) == ("somewhere/else.raw", "raw")
    assert found.unknown_extensions == [(0x77777777, b"not ours")]
    assert found.compatible_features == 1 << 40
    small = open_image(MemoryFile(make(SIZE, cluster_size=512)), node_options=WRITABLE)
    with pytest.raises(LaminaError, match="No space left on device"):
        DRIVER.change_backing_file(small, "x" * 500, "raw")
    with pytest.raises(LaminaError, match="Invalid argument"):
        DRIVER.change_backing_file(disk, "x" * 1024, "raw")
    assert Header.parse(bytes(file.content)) == found
    DRIVER.change_backing_file(disk, None, None)
    found = Header.parse(bytes(file.content))
    assert (found.backing_file, found.backing_format) == (None, None)
    assert b"somewhere" not in file.content
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


def test_made_empty() -> None:
    file, disk = new(backing=b"\7" * SIZE)
    disk.write(0, b"x" * 100 * KIB)
    disk.write_zeroes(200 * KIB, 100 * KIB)
    disk.write_compressed([(400 * KIB, memoryview(b"c" * UNIT))])
    disk.flush()
    DRIVER.make_empty(disk)
    assert disk.read(0, SIZE) == b"\7" * SIZE
    assert len(file.content) == 4 * UNIT
    disk.write(5, b"again")
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


# -- announcements ---------------------------------------------------------------------------------


def test_events() -> None:
    file, disk = new()
    file.events.clear()
    disk.write(100, b"x" * UNIT)
    disk.flush()
    assert [event for event in file.events if event != "refblock_load"] == [
        "reftable_load",
        "cluster_alloc",
        "refblock_alloc",
        "l2_alloc_write",
        "cluster_alloc",
        "refblock_alloc",
        "write_aio",
        "flush_to_os",
        "refblock_update_part",
        "flush_to_disk",
        "l2_update",
        "l1_update",
        "flush_to_disk",
    ]
    file.events.clear()
    disk.write_compressed([(0x10000, memoryview(b"c" * UNIT))])
    assert "cluster_alloc_bytes" in file.events
    assert file.events[-1] == "l2_update_compressed"
    file.events.clear()
    disk.discard(0, UNIT)
    disk.flush()
    assert "cluster_free" in file.events
    file.events.clear()
    again = open_image(read_only(bytes(file.content)))
    again.read(UNIT, 10)
    assert isinstance(again.file, MemoryFile)
    assert again.file.events == ["l2_load", "read_aio"]


def test_events_of_growing() -> None:
    file, disk = new(cluster_size=512, refcount_bits=64)
    file.events.clear()
    disk.write_vmstate(0, memoryview(b"v" * (512 * 4200)))
    disk.flush()
    for event in (
        "vmstate_save",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "reftable_grow",
        "refblock_alloc_write",
        "refblock_alloc_hookup",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
    ):
        assert event in file.events, event
    file.events.clear()
    disk.truncate(SIZE // 4)
    assert "l1_shrink_write_table" in file.events
    assert "l1_shrink_free_l2_clusters" in file.events
    DRIVER.make_empty(disk)
    assert "empty_image_prepare" in file.events
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


# -- VM state --------------------------------------------------------------------------------------


def test_vm_state_lies_behind_the_disk_and_nowhere_else() -> None:
    file, disk = new(backing=b"\7" * (4 * SIZE))
    offset = mapping_of(disk).vmstate_offset
    assert offset == 2 * SIZE
    state = bytes(range(256)) * 40
    disk.write_vmstate(1000, memoryview(state))
    buffer = bytearray(len(state) + 2000)
    disk.read_vmstate(0, memoryview(buffer))
    assert buffer == bytes(1000) + state + bytes(1000)
    # The disk does not grow into it.
    disk.truncate(4 * SIZE, zeroed=True)
    assert disk.read(SIZE, 3 * SIZE) == bytes(3 * SIZE)
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


@pytest.mark.parametrize("shared", [False, True], ids=["ours", "a snapshot's too"])
def test_a_cluster_that_keeps_its_place_is_emptied_only_while_nobody_needs_it(shared):
    file = MemoryFile(make(64 << 10, cluster_size=4096), WRITABLE)
    disk = open_image(file, node_options=WRITABLE, discard_no_unref="on")
    disk.write(0, b"a" * 12288)
    if shared:
        DRIVER.create_snapshot(disk, SnapshotInfo("", "s", 0, 1, 0, 0, 0))
    disk.flush()
    disk.discard(0, 12288)
    # Written to before the discard is durable: the file must not forget what is new.
    disk.write(4096, b"b" * 4096)
    disk.flush()
    assert disk.read(0, 12288) == bytes(4096) + b"b" * 4096 + bytes(4096)
    disk.close()
    reader = open_image(read_only(bytes(file.content)))
    assert reader.read(0, 12288) == bytes(4096) + b"b" * 4096 + bytes(4096)
    if shared:
        DRIVER.load_snapshot(reader, "s")
        assert reader.read(0, 12288) == b"a" * 12288
