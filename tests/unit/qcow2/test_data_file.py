"""External data files: where data goes, what is given up when, and whom the policy lets through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.block.policy import Policy
from lamina.block.session import Session
from lamina.engine.disk import Disk
from lamina.errors import LaminaError, Refused, StorageError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.space import ClusterSet
from lamina.testing.memory import MemoryFile

from .images import make, open_image, verify

UNIT = 1 << 10
SIZE = 100 * UNIT
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def disk_of(**options: Any) -> tuple[Disk, MemoryFile]:
    data = MemoryFile(options=WRITABLE)
    content = make(SIZE, data=data, cluster_size=UNIT, **options)
    return open_image(MemoryFile(content), data=data, node_options=WRITABLE), data


def test_data_lies_where_its_address_says() -> None:
    disk, data = disk_of()
    disk.write(5 * UNIT + 3, b"guest")
    disk.write(0, b"first")
    assert data.content[5 * UNIT + 3 : 5 * UNIT + 8] == b"guest"
    assert data.content[:5] == b"first"
    for extent in disk.extents(0, SIZE):
        if extent.host_offset >= 0:
            assert extent.host_offset == extent.guest_offset
            assert extent.node is data
    disk.flush()
    assert verify(bytes(disk.file.content)) == ([], [])  # type: ignore[attr-defined]
    assert not disk.supports_compressed_writes
    with pytest.raises(LaminaError):
        disk.write_compressed([(0, b"z" * UNIT)])


def test_what_is_given_up_is_discarded_once_it_is_durable() -> None:
    disk, data = disk_of()
    disk.write(0, b"x" * 4 * UNIT)
    disk.flush()
    disk.discard(0, 3 * UNIT)
    assert data.content[: 4 * UNIT] == b"x" * 4 * UNIT
    # Taken again before anybody could know.
    disk.write(UNIT, b"y" * UNIT)
    disk.flush()
    disk.flush()
    assert data.content[: 4 * UNIT] == bytes(UNIT) + b"y" * UNIT + bytes(UNIT) + b"x" * UNIT
    assert disk.read(0, 4 * UNIT) == data.content[: 4 * UNIT]


def test_a_read_keeps_what_it_reads() -> None:
    disk, data = disk_of()
    disk.write(0, b"x" * UNIT)
    disk.flush()
    token = disk.pins.enter()
    disk.discard(0, UNIT)
    disk.flush()
    assert data.content[:UNIT] == b"x" * UNIT
    disk.pins.leave(token)
    disk.flush()
    assert data.content[:UNIT] == bytes(UNIT)


def test_stale_data_is_not_believed() -> None:
    disk, data = disk_of()
    disk.write(0, b"old" * UNIT)
    disk.write_zeroes(0, UNIT)
    assert data.content[:UNIT] != bytes(UNIT)
    disk.write(10, b"new")
    assert disk.read(0, UNIT) == bytes(10) + b"new" + bytes(UNIT - 13)


@pytest.mark.parametrize("flags", [WriteFlags.NONE, WriteFlags.MAY_UNMAP])
def test_a_raw_file_reads_like_the_disk(flags: WriteFlags) -> None:
    disk, data = disk_of(data_file_raw=True)
    rng = random.Random(2)
    for _ in range(60):
        offset = rng.randrange(SIZE - 5000)
        disk.write(offset, rng.randbytes(rng.randrange(1, 5000)))
        offset = rng.randrange(SIZE - 5000)
        disk.write_zeroes(offset, rng.randrange(1, 5000), flags)
        disk.discard(rng.randrange(SIZE // UNIT) * UNIT, UNIT)
        assert data.content[:SIZE] == disk.read(0, SIZE)


def test_a_raw_file_that_cannot_be_zeroed_is_no_reason_to_say_so() -> None:
    disk, data = disk_of(data_file_raw=True)
    disk.write(0, b"x" * 4 * UNIT)

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "zero":
            raise StorageError.from_errno(5)

    data.hook = hook
    with pytest.raises(StorageError):
        disk.write_zeroes(0, 2 * UNIT)
    with pytest.raises(StorageError):
        disk.discard(0, 2 * UNIT)
    data.hook = None
    assert disk.read(0, SIZE) == data.content[:SIZE] == (b"x" * 4 * UNIT).ljust(SIZE, b"\0")


def test_a_longer_raw_file_does_not_show_when_the_disk_grows() -> None:
    disk, data = disk_of(data_file_raw=True)
    data.content += b"rest" * UNIT
    disk.truncate(SIZE + 2 * UNIT, zeroed=True)
    assert disk.read(SIZE, 2 * UNIT) == bytes(2 * UNIT) == data.content[SIZE : SIZE + 2 * UNIT]


def test_snapshots_are_refused() -> None:
    from lamina.block.info import SnapshotInfo

    disk, _ = disk_of()
    with pytest.raises(LaminaError, match="Operation not supported"):
        DRIVER.create_snapshot(disk, SnapshotInfo("", "s", 0, 0, 0, 0, 0))
    with pytest.raises(LaminaError, match="Failed to load snapshot: Operation not supported"):
        DRIVER.apply_snapshot(disk, "s")


def test_sets_of_clusters() -> None:
    rng = random.Random(4)
    ours, model = ClusterSet(), set[int]()
    for _ in range(3000):
        first = rng.randrange(60)
        end = first + rng.randrange(1, 12)
        span = set(range(first, end))
        if rng.random() < 0.5:
            ours.add(first, end)
            model |= span
        else:
            removed = [n for low, high in ours.remove(first, end) for n in range(low, high)]
            assert removed == sorted(model & span)
            model -= span


# -- opening ---------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("dir", "dir/sub"):
        Path(name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "beside"),
    [("dir/near", True), ("dir/sub/near", True), ("far", False), ("dir/../far", False)],
)
def test_the_gate(home: Path, name: str, beside: bool) -> None:
    session = Session()
    create_image("dir/top", "qcow2", session=session, options={"data_file": name}, size=SIZE)
    options = {"file.filename": "dir/top", "driver": "qcow2"}

    def opens(policy: Policy, **more: str) -> bool:
        try:
            Backend.open({**options, **more}, session=Session(None, policy, print)).close()
        except Refused as error:
            assert "data file" in str(error)  # noqa: PT017
            return False
        return True

    assert opens(Policy.ALLOW)
    assert opens(Policy.BESIDE) is beside
    assert not opens(Policy.DENY)
    # What the user says himself passes no gate.
    assert opens(Policy.DENY, **{"data-file.filename": name})
    Path(name).unlink()
    with Backend.open("dir/top", session=Session(None, Policy.DENY), inspect=True) as image:
        specific = image.info().specific
        assert specific is not None
        assert specific["data-file"] == name


def test_a_failed_creation_leaves_no_file(home: Path) -> None:
    session = Session()
    with pytest.raises(LaminaError):
        create_image(
            "x", "qcow2", session=session, options={"data_file": "no/where"}, size=SIZE
        )
    assert not Path("x").exists()


def test_a_data_file_may_be_a_node_of_the_graph(home: Path) -> None:
    session = Session()
    create_image("x", "qcow2", session=session, options={"data_file": "d"}, size=SIZE)
    options = {
        "driver": "qcow2",
        "file.filename": "x",
        "data-file.driver": "raw",
        "data-file.file.driver": "blkdebug",
        "data-file.file.image.filename": "d",
    }
    with Backend.open(options, session=session, writable=True) as disk:
        disk.write(UNIT, b"through filters")
    assert Path("d").read_bytes()[UNIT : UNIT + 15] == b"through filters"
