"""blkdebug as a node: threads at breakpoints, batches, extents, permissions, names.

What its rules do is held against qemu-io in ``tests/interop/test_blkdebug.py``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.block.extents import Kind
from lamina.block.node import NodeOptions
from lamina.block.opening import open_node
from lamina.block.permissions import Perm
from lamina.block.session import Session
from lamina.errors import StorageError
from lamina.filters.blkdebug.node import BlkdebugNode

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(MIB)
    return path


@pytest.fixture
def opened() -> Iterator[list[BlkdebugNode]]:
    nodes: list[BlkdebugNode] = []
    yield nodes
    for node in nodes:
        node.close()


@pytest.fixture
def open_debug(path: Path, opened: list[BlkdebugNode]) -> Any:
    def open_one(**options: Any) -> BlkdebugNode:
        given = {"driver": "blkdebug", "image.driver": "file", "image.filename": str(path)}
        given.update(options)
        defaults = NodeOptions(read_only=False, unmap=True)
        node = open_node(given, session=Session(), defaults=defaults, protocol=True)
        assert isinstance(node, BlkdebugNode)
        node.used_by(None, "test", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        opened.append(node)
        return node

    return open_one


def started(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_suspended_request_waits(open_debug: Any, capsys: pytest.CaptureFixture[str]) -> None:
    node = open_debug()
    node.set_breakpoint("pwritev", "A")
    assert not node.is_suspended("A")
    assert not node.wait_suspended("A", 0.01)
    thread = started(lambda: node.write(0, b"x" * 512))
    assert node.wait_suspended("A", 10)
    assert node.is_suspended("A")
    assert node.read(0, 512) == bytes(512)
    node.resume("A")
    thread.join(10)
    assert not thread.is_alive()
    assert node.read(0, 512) == b"x" * 512
    assert capsys.readouterr().out == (
        "blkdebug: Suspended request 'A'\nblkdebug: Resuming request 'A'\n"
    )


def test_closing_lets_everybody_go(open_debug: Any) -> None:
    node = open_debug()
    node.set_breakpoint("pwritev", "A")

    def write() -> None:
        with contextlib.suppress(StorageError):  # the file may be gone by now
            node.write(0, b"x" * 512)

    thread = started(write)
    assert node.wait_suspended("A", 10)
    node.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_failed_batch_fails(open_debug: Any) -> None:
    node = open_debug(**{"inject-error.0.event": "none", "inject-error.0.sector": 8})
    with pytest.raises(StorageError, match="Input/output error"):
        node.writev([(0, b"x" * 512), (4096, b"y" * 512), (8192, b"z" * 512)])
    assert node.read(8192, 512) == bytes(512)


def test_whoever_fetches_data_meets_the_rules(open_debug: Any) -> None:
    node = open_debug()
    node.write(65536, b"x" * 4096)
    node.flush()
    data = [one for one in node.extents(0, MIB) if one.kind is Kind.DATA]
    assert [(one.guest_offset, one.length, one.host_offset) for one in data] == [
        (65536, 4096, 65536)
    ]
    assert data[0].node is node


def test_flushes_fail_only_where_there_is_something_to_flush(open_debug: Any) -> None:
    node = open_debug(**{"inject-error.0.event": "none", "inject-error.0.iotype": "flush"})
    node.flush()
    node.write(0, b"x" * 512)
    for _ in range(2):
        with pytest.raises(StorageError):
            node.flush()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "blkdebug::{}"),
        ({"config": "/dev/null"}, "blkdebug:/dev/null:{}"),
        (
            {"align": "512"},
            'json:{{"image": {{"driver": "file", "filename": "{}"}}, '
            '"driver": "blkdebug", "align": "512"}}',
        ),
    ],
)
def test_names(open_debug: Any, path: Path, options: dict[str, str], name: str) -> None:
    assert open_debug(**options).filename == name.format(path)


@pytest.mark.peer
@pytest.mark.skipif(sys.platform != "linux", reason="open file description locks")
@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
def test_permissions_taken_and_unshared(open_debug: Any, path: Path) -> None:
    def locked() -> set[int]:
        lines = Path("/proc/locks").read_text()
        found = re.findall(rf"OFDLCK .*:{path.stat().st_ino} (\d+) (\d+)", lines)
        return {at for first, last in found for at in range(int(first), int(last) + 1)}

    extra = {"take-child-perms.0": "resize", "unshare-child-perms.0": "write"}
    options = ",".join(
        f"{key}={value}"
        for key, value in {
            "driver": "blkdebug",
            "image.driver": "file",
            "image.filename": path,
            **extra,
        }.items()
    )
    with subprocess.Popen(
        ["qemu-io", "--image-opts", options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        expected = locked()
        holder.stdin.close()
    assert expected == {100, 101, 103, 201}
    open_debug(**extra)
    assert locked() == expected
