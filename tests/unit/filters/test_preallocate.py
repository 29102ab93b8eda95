"""preallocate: what the file looks like while it is written, and afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions
from lamina.block.opening import open_node
from lamina.block.permissions import Perm
from lamina.block.session import Session
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.filters.preallocate import PreallocateNode, PreallocateOptions
from lamina.testing.memory import MemoryFile

KIB, MIB = 1 << 10, 1 << 20
GROWS = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


class Quick(MemoryFile):
    """Zeroes at once, and says how."""

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        self.zeroed.append((offset, length, flags))
        super().write_zeroes(offset, length, flags)

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self.zeroed: list[tuple[int, int, WriteFlags]] = []


class Slow(MemoryFile):
    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        if flags & WriteFlags.NO_FALLBACK:
            raise ImageUnsupported("Operation not supported")
        super().write_zeroes(offset, length, flags)


def over(file: MemoryFile, *, perm: Perm = GROWS) -> PreallocateNode:
    own = PreallocateOptions(align=64 * KIB, size=MIB)
    node = PreallocateNode(NodeOptions(read_only=False), file, own)
    node.used_by(None, "writer", perm, Perm.ALL)
    return node


def test_files_grow_in_large_steps() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 1000)
    grown = 64 * KIB + MIB + 64 * KIB
    assert len(file.content) == grown
    assert node.size == 64 * KIB + 1024
    assert file.zeroed == [(64 * KIB, grown - 64 * KIB, WriteFlags.NO_FALLBACK)]
    for at in range(128 * KIB, grown, 64 * KIB):
        node.write(at, b"y" * 64 * KIB)
    assert len(file.zeroed) == 1
    assert len(file.content) == grown == node.size
    node.write(grown, b"z")
    assert len(file.content) == grown + MIB + 64 * KIB


def test_writes_inside_need_nothing() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(0, b"x" * 64 * KIB)
    node.write_zeroes(0, 64 * KIB)
    assert len(file.content) == 64 * KIB
    assert file.zeroed == [(0, 64 * KIB, WriteFlags.NONE)]


def test_zeroes_in_the_tail_are_there_already() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)
    before = list(file.calls)
    node.write_zeroes(128 * KIB, 64 * KIB)
    assert file.calls == before
    assert node.size == 192 * KIB
    assert node.read(64 * KIB, 128 * KIB) == b"x" * 512 + bytes(128 * KIB - 512)
    node.write_zeroes(64 * KIB, 512)
    assert node.read(64 * KIB, 512) == bytes(512)


def test_without_quick_zeroes_nothing_is_preallocated() -> None:
    file = Slow(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 1024)
    node.write_zeroes(70 * KIB, 2 * KIB)
    assert len(file.content) == node.size == 72 * KIB
    assert node.read(64 * KIB, 8 * KIB) == b"x" * 1024 + bytes(7 * KIB)


def test_who_may_not_resize_does_not_preallocate() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file, perm=Perm.CONSISTENT_READ | Perm.WRITE)
    node.write(64 * KIB, b"x" * 512)
    assert len(file.content) == node.size == 64 * KIB + 512
    assert file.zeroed == []


def test_the_rest_is_cut_off_at_the_end() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 1000)
    node.close()
    assert file.content == bytes(64 * KIB) + b"x" * 1000


def test_the_rest_is_cut_off_when_nobody_grows_any_more() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)
    writer = node.users[0]
    writer.change(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    assert len(file.content) == node.size == 64 * KIB + 512
    writer.change(GROWS, Perm.ALL)
    node.write(128 * KIB, b"y")
    assert len(file.content) > MIB
    writer.change(Perm.CONSISTENT_READ, Perm.ALL)
    node.reopen(read_only=True)
    assert len(file.content) == 128 * KIB + 1


def test_the_permission_to_cut_is_still_there() -> None:
    """The tail goes before the locks that protect it do."""
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)
    held: list[Perm] = []
    file.hook = lambda kind, offset, length: held.append(file.cumulative_permissions()[0])
    node.users[0].change(Perm.CONSISTENT_READ, Perm.ALL)
    assert held == [GROWS]


def test_a_tail_that_does_not_want_to_go() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "truncate":
            raise StorageError.from_errno(errno.EIO)

    file.hook = fail
    with pytest.raises(LaminaError) as caught:
        node.close()
    assert str(caught.value) == "Failed to drop preallocation: Input/output error"
    assert node.closed


def test_growing_into_the_tail_costs_nothing() -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)
    before = list(file.calls)
    node.truncate(512 * KIB)
    assert node.size == 512 * KIB
    assert file.calls == before
    assert node.read(128 * KIB, 384 * KIB) == bytes(384 * KIB)


@pytest.mark.parametrize(
    ("size", "mode"),
    [(4 * MIB, Preallocation.OFF), (32 * KIB, Preallocation.OFF), (MIB, Preallocation.FULL)],
)
def test_other_lengths_are_set_for_real(size: int, mode: Preallocation) -> None:
    file = Quick(bytes(64 * KIB))
    node = over(file)
    node.write(64 * KIB, b"x" * 512)
    node.truncate(size, mode)
    assert len(file.content) == node.size == size
    if size > 64 * KIB:
        assert node.read(64 * KIB, size - 64 * KIB) == b"x" * 512 + bytes(size - 64 * KIB - 512)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "prealloc-align=100",
            "prealloc-align parameter of preallocate filter is not aligned to 512",
        ),
        (
            "prealloc-align=512,file.driver=blkdebug,file.align=4k",
            "prealloc-align parameter of preallocate filter is not aligned to underlying node "
            "request alignment (4096)",
        ),
    ],
)
def test_bad_options(tmp_path: Path, option: str, message: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    given = {
        "driver": "preallocate",
        "file.driver": "file",
        "file.filename": str(tmp_path / "disk"),
    }
    given.update(part.split("=") for part in option.split(","))
    if given["file.driver"] == "blkdebug":
        given["file.image.driver"] = "file"
        given["file.image.filename"] = given.pop("file.filename")
    with pytest.raises(UsageError) as caught:
        open_node(given, session=Session(), defaults=NodeOptions(), protocol=True)
    assert str(caught.value) == message


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
def test_a_qcow2_image_on_a_preallocated_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    options = (
        f"driver=qcow2,file.driver=preallocate,file.file.driver=file,file.file.filename={path}"
    )
    with Backend.open(options, image_opts=True, session=Session(), writable=True) as disk:
        disk.write(0, b"x" * 65536)
        disk.write(MIB, b"y" * 3 * MIB)
        disk.flush()
        held = os.stat(path).st_size
        assert held % MIB == 0
        assert held > 128 * MIB
        file: Node = disk.node.file
        assert file.size < 8 * MIB
    assert os.stat(path).st_size < 8 * MIB
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    reads = ["read -P 120 0 64k", "read -P 121 1M 3M", "read -P 0 64k 960k"]
    command = ["qemu-io", *(part for read in reads for part in ("-c", read)), str(path)]
    subprocess.run(command, check=True, capture_output=True)
