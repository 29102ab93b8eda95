"""Every kind of damage: found, repaired, and repaired again after a power cut in between."""

from __future__ import annotations

import errno
import struct

import pytest

from lamina.block.info import SnapshotInfo
from lamina.block.node import NodeOptions
from lamina.errors import ImageUnsupported, StorageError
from lamina.formats.qcow2 import DRIVER
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import open_image, read_only, verify
from tests.unit.qcow2_check.damage import (
    ALL,
    DAMAGES,
    DATA,
    LEAKS,
    NOTHING,
    PACKED,
    UNIT,
    WRITABLE,
    Damage,
    Image,
    damaged,
    is_clean,
    run_check,
    sound,
)

CLUSTERS = [DATA[start : start + UNIT] for start in range(0, len(DATA), UNIT)] + [PACKED]

each_damage = pytest.mark.parametrize(
    "damage", DAMAGES, ids=lambda damage: damage.name.replace(" ", "-")
)


def assert_kept(content: bytes, damage: Damage) -> None:
    """What was not lost reads as before."""
    disk = open_image(MemoryFile(content))
    for index, cluster in enumerate(CLUSTERS):
        if index not in damage.lost:
            assert disk.read(index * UNIT, UNIT) == cluster, f"cluster {index}"
    disk.close()


def test_a_sound_image() -> None:
    for options in ({}, {"compat": "0.10"}, {"refcount_bits": 1}, {"refcount_bits": 64}):
        content = sound(**options)
        file = MemoryFile(content)
        result, lines = run_check(file, ALL)
        assert is_clean(result)
        assert lines == []
        assert file.content == content
        version_2 = "compat" in options
        assert result.allocated_clusters == (5 if version_2 else 6)
        assert result.compressed_clusters == 1
        assert result.image_end_offset == -(-len(content) // UNIT) * UNIT


@each_damage
def test_found_without_a_change(damage: Damage) -> None:
    content = damaged(damage)
    file = MemoryFile(content)
    result, lines = run_check(file, NOTHING)
    assert file.content == content
    if damage.name not in ("dirty", "corrupt"):
        assert not is_clean(result)
        assert len(lines) >= result.corruptions + result.leaks


@each_damage
def test_repaired(damage: Damage) -> None:
    file = MemoryFile(damaged(damage))
    result, _ = run_check(file, ALL)
    if not damage.repairable:
        assert result.corruptions
        assert file.content == damaged(damage)
        return
    again, lines = run_check(file, NOTHING)
    assert is_clean(again), lines
    verdict = verify(bytes(file.content))
    assert verdict.errors == []
    assert verdict.leaks == []
    if damage.options.get("compat") != "0.10":
        assert file.content[79] & 3 == 0
    assert_kept(bytes(file.content), damage)


@each_damage
def test_only_leaks(damage: Damage) -> None:
    """Leaks are repaired, whatever else is wrong stays wrong, and nothing gets worse."""
    content = damaged(damage)
    before, _ = run_check(MemoryFile(content), NOTHING)
    file = MemoryFile(content)
    try:
        result, _ = run_check(file, LEAKS)
    except StorageError as error:
        failure = error
    else:
        failure = None
    if failure is not None:
        assert failure.errno == errno.EIO
        assert file.content == content
        return
    assert result.corruptions <= before.corruptions
    if damage.repairable:
        assert result.leaks == 0
        after, _ = run_check(file, ALL)
        assert is_clean(after)
        assert_kept(bytes(file.content), damage)


@each_damage
def test_power_cuts_during_the_repair(damage: Damage) -> None:
    if not damage.repairable:
        return
    content = damaged(damage)

    def workload(file: CrashFile, guest: GuestLog) -> None:
        run_check(file, ALL)

    for cut in power_cuts(workload, initial=content, guest_content=b"", subsets=1):
        file = MemoryFile(cut.content)
        run_check(file, ALL)
        again, lines = run_check(file, NOTHING)
        assert is_clean(again), (str(cut), lines)
        assert_kept(bytes(file.content), damage)


@each_damage
def test_reads_and_writes_after_the_repair(damage: Damage) -> None:
    """The disk that was checked is used further: nothing stale is left in memory."""
    if not damage.repairable:
        return
    file = MemoryFile(damaged(damage))
    writable = NodeOptions(read_only=False, filename="memory")
    disk = open_image(file, node_options=writable, check=True)
    DRIVER.check(disk, ALL, lambda line: None)
    for index in range(40):
        disk.write(index * UNIT + 100, bytes([index]) * 5000)
    disk.close()
    assert verify(bytes(file.content)).errors == []
    assert is_clean(run_check(file, NOTHING)[0])


def with_snapshot() -> Image:
    file = MemoryFile(sound())
    disk = open_image(file, node_options=WRITABLE)
    info = SnapshotInfo("", "one", 0, 5, 0, 0, 0, 0)
    DRIVER.create_snapshot(disk, info)
    disk.write(0, b"after" * UNIT)
    disk.close()
    return Image(bytes(file.content))


def test_snapshot_table_mended() -> None:
    """Entries without their extra data, with too much of it, and a table that is not there."""
    image = with_snapshot()
    table = image.get(64)
    (extra,) = struct.unpack_from(">I", image.content, table + 36)
    for change, line in (
        (lambda: image.content.__setitem__(slice(table + 36, table + 40), bytes(4)), "Repairing"),
        (lambda: struct.pack_into(">I", image.content, table + 36, 2000), "Discarding"),
        (lambda: image.put(64, 1 << 30), "Repairing"),
    ):
        struct.pack_into(">I", image.content, table + 36, extra)
        image.put(64, table)
        change()
        file = MemoryFile(bytes(image.content))
        _, lines = run_check(file, ALL)
        assert any(one.startswith(line) for one in lines), lines
        result, lines = run_check(file, ALL)
        result, lines = run_check(file, NOTHING)
        assert is_clean(result), lines
        verdict = verify(bytes(file.content))
        assert verdict.errors == []
        assert len(open_image(read_only(bytes(file.content))).info().snapshots) == 1


def test_a_dirty_image_is_repaired_as_it_is_opened() -> None:
    image = Image(sound())
    image.change(72, set=1)
    image.set_count(image.place(0), 0)
    content = bytes(image.content)
    file = MemoryFile(content)
    open_image(read_only(content)).close()
    disk = open_image(file, node_options=WRITABLE)
    disk.write(10 * UNIT, b"x" * UNIT)
    disk.close()
    assert file.content[79] == 0
    assert verify(bytes(file.content)) == ([], [])
    assert_kept(bytes(file.content), DAMAGES[0])


def test_a_dirty_image_that_cannot_be_repaired_is_refused() -> None:
    image = Image(sound())
    image.change(72, set=1)
    image.put(40, 1 << 40)
    file = MemoryFile(bytes(image.content))
    with pytest.raises(ImageUnsupported) as caught:
        open_image(file, node_options=WRITABLE)
    assert str(caught.value) == "Could not repair dirty image: Input/output error"
    assert file.content == image.content


def test_a_failing_repair_can_be_repeated() -> None:
    """An error in the middle of a repair leaves what a power cut leaves."""
    content = damaged(next(one for one in DAMAGES if one.name == "refcount block missing"))
    for failing in range(12):
        file = MemoryFile(content)
        writes = 0

        def fail(kind: str, offset: int, length: int, failing: int = failing) -> None:
            nonlocal writes
            if kind in ("write", "flush"):
                writes += 1
                if writes > failing:
                    raise StorageError.from_errno(errno.EIO)

        file.hook = fail
        try:
            run_check(file, ALL)
        except StorageError:
            assert writes > failing
        file.hook = None
        run_check(file, ALL)
        assert is_clean(run_check(file, NOTHING)[0])
        assert_kept(bytes(file.content), DAMAGES[0])


def test_more_snapshots_than_there_may_be() -> None:
    image = Image(sound(compat="0.10"))
    image.put(64, image.grow(2))
    struct.pack_into(">I", image.content, 60, 65540)
    file = MemoryFile(bytes(image.content))
    with pytest.raises(StorageError) as caught:
        run_check(file, NOTHING)
    assert caught.value.errno == errno.EFBIG
    _, lines = run_check(file, ALL)
    assert lines[0] == "Discarding 4 overhanging snapshots"
    assert Image(bytes(file.content)).header.nb_snapshots == 65536
