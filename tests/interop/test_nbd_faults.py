"""Servers whose storage is full or fails: clients get the right error, and nothing is acknowledged
that was not done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.errors import StorageError
from tests.interop.nbd_servers import (
    LIBNBD_PYTHON,
    SERVERS,
    SIZE,
    Server,
    assert_consistent,
    content_of,
    image,
    lamina_nbd,
    needs_nbdsh,
    opened,
    qemu_nbd,
    run,
    url,
)

pytestmark = pytest.mark.peer

PIECE = 8 << 10
"""Small, so that many arrive at once."""
PIECES = SIZE // PIECE

LIBNBD_WRITES = f"""
import json, nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
outcome, pending = {{}}, {{}}
for n in range({PIECES}):
    data = nbd.Buffer.from_bytearray(bytearray([n % 255 + 1]) * {PIECE})
    pending[h.aio_pwrite(data, n * {PIECE})] = n
while pending:
    h.poll(-1)
    for cookie, n in list(pending.items()):
        try:
            if not h.aio_command_completed(cookie):
                continue
            outcome[n] = None
        except nbd.Error as error:
            outcome[n] = error.errno
        del pending[cookie]
try:
    h.flush()
    outcome["flush"] = None
except nbd.Error as error:
    outcome["flush"] = error.errno
for n in range({PIECES}):
    if outcome[n] is None:
        assert h.pread({PIECE}, n * {PIECE}) == bytes([n % 255 + 1]) * {PIECE}, n
print(json.dumps(outcome))
"""
"""All pieces at once, each filled with its number; which were written, and why not. What was
acknowledged reads back."""


def write_all(socket: Path) -> tuple[list[str | None], str | None]:
    """The outcome of each piece, and of the flush that followed."""
    told = json.loads(run(LIBNBD_PYTHON, "-c", LIBNBD_WRITES, url(socket)))
    return [told[str(n)] for n in range(PIECES)], told["flush"]


def failures(disk: Backend, pieces: Iterable[int]) -> list[str]:
    """What our client says where it writes these again, one after the other."""
    found = []
    for n in pieces:
        try:
            disk.write(n * PIECE, bytes([n % 255 + 1]) * PIECE)
        except StorageError as error:
            found.append(str(error))
    return found


def assert_has_what_was_acknowledged(found: bytes, outcome: list[str | None]) -> None:
    for n, error in enumerate(outcome):
        if error is None:
            assert found[n * PIECE : (n + 1) * PIECE] == bytes([n % 255 + 1]) * PIECE, n


@pytest.fixture
def small_place(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        run("umount", place)


@needs_nbdsh
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("server", SERVERS)
def test_disk_full(tmp_path: Path, small_place: Path, server: Server, format: str) -> None:
    disk, socket = image(small_place, format), tmp_path / "socket"
    with server(socket, "-f", format, disk):
        outcome, flushed = write_all(socket)
        assert set(outcome) == {None, "ENOSPC"}
        assert flushed is None
        lost = [n for n, error in enumerate(outcome) if error]
        with suppress(StorageError), opened(socket) as backend:  # closing it may fail as well
            assert set(failures(backend, lost)) == {"No space left on device"}
    shutil.copy(disk, tmp_path)
    disk = tmp_path / disk.name
    if format == "qcow2":
        assert_consistent(disk, leaks=True)
    assert_has_what_was_acknowledged(content_of(disk, format), outcome)


@needs_nbdsh
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_room_is_made(tmp_path: Path, small_place: Path, format: str) -> None:
    """Nothing is lost of what was acknowledged, and everything else can be done then."""
    disk, socket = image(small_place, format), tmp_path / "socket"
    with lamina_nbd(socket, "-f", format, disk):
        outcome, _ = write_all(socket)
        assert set(outcome) == {None, "ENOSPC"}
        run("mount", "-o", "remount,size=8m", small_place)
        assert "failed" not in run("qemu-io", "-f", "raw", "-c", "flush", url(socket))
        shutil.copy(disk, tmp_path / "flushed")
        again, flushed = write_all(socket)
        assert {*again, flushed} == {None}
    if format == "qcow2":
        assert_consistent(tmp_path / "flushed", leaks=True)
        assert_consistent(disk, leaks=False)
    assert_has_what_was_acknowledged(content_of(tmp_path / "flushed", format), outcome)
    shutil.move(disk, tmp_path)
    assert_has_what_was_acknowledged(content_of(tmp_path / disk.name, format), again)


def failing(disk: Path, format: str, **fault: object) -> tuple[str, str]:
    """The options of a server whose storage fails so."""
    words = "".join(f",file.inject-error.0.{key}={value}" for key, value in fault.items())
    return (
        "--image-opts",
        f"driver={format},discard=unmap,file.driver=blkdebug,file.image.driver=file"
        f",file.image.discard=unmap,file.image.filename={disk}{words}",
    )


@needs_nbdsh
def test_one_bad_sector(tmp_path: Path) -> None:
    """Of all the writes that arrive together exactly one fails, and all the others are done."""
    bad = 77
    for server in (lamina_nbd, qemu_nbd):
        disk, socket = image(tmp_path, "raw"), tmp_path / "socket"
        sector = (bad * PIECE + PIECE // 2) // 512
        options = failing(disk, "raw", event="none", iotype="write", sector=sector, errno=5)
        with server(socket, *options):
            outcome, flushed = write_all(socket)
            assert [n for n, error in enumerate(outcome) if error] == [bad]
            assert outcome[bad] == "EIO"
            assert flushed is None
            with opened(socket) as backend:
                assert failures(backend, range(PIECES)) == ["Input/output error"]
        assert_has_what_was_acknowledged(disk.read_bytes(), outcome)


LIBNBD_DOES_EVERYTHING = """
import json, nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
outcome = {}
for name, action in (
    ("read", lambda: h.pread(4096, 65536)),
    ("read elsewhere", lambda: h.pread(4096, 131072)),
    ("write", lambda: h.pwrite(b"1" * 4096, 65536)),
    ("write elsewhere", lambda: h.pwrite(b"2" * 4096, 131072)),
    ("FUA", lambda: h.pwrite(b"3" * 4096, 131072, nbd.CMD_FLAG_FUA)),
    ("zero", lambda: h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)),
    ("trim", lambda: h.trim(65536, 65536)),
    ("flush", lambda: h.flush()),
):
    try:
        action()
        outcome[name] = None
    except nbd.Error as error:
        outcome[name] = error.errno
print(json.dumps(outcome))
"""


@needs_nbdsh
@pytest.mark.parametrize(
    ("kind", "fail"),
    [
        ("read", {"read"}),
        ("write", {"write"}),
        ("write-zeroes", {"zero"}),
        ("discard", {"trim"}),
        ("flush", {"flush"}),
    ],
)
def test_requests_of_a_kind(tmp_path: Path, kind: str, fail: set[str]) -> None:
    """They get the error that those at qemu-nbd get, and nobody else does. Where a read fails,
    qemu-nbd breaks the connection; ours goes on."""
    found = []
    for server in (lamina_nbd, qemu_nbd) if kind != "read" else (lamina_nbd,):
        disk, socket = tmp_path / "disk.raw", tmp_path / "socket"
        disk.write_bytes(b"x" * SIZE)
        fault: dict[str, object] = {"event": "none", "iotype": kind, "errno": 5}
        if kind != "flush":
            fault["sector"] = 128
        with server(socket, *failing(disk, "raw", **fault)):
            told = run(LIBNBD_PYTHON, "-c", LIBNBD_DOES_EVERYTHING, url(socket))
        found.append(json.loads(told))
    assert {name: error for name, error in found[0].items() if error} == dict.fromkeys(fail, "EIO")
    assert found[0] == found[-1]


def write_and_flush(disk: Backend) -> None:
    disk.write(SIZE // 2, b"x" * (64 << 10))
    disk.flush()


@needs_nbdsh
@pytest.mark.parametrize(
    "event", ["cluster_alloc", "l2_update", "refblock_update_part", "write_aio"]
)
def test_qcow2_on_storage_that_fails(tmp_path: Path, event: str) -> None:
    """Once, in the middle of something: the client is told, and everything goes on."""
    disk, socket = image(tmp_path, "qcow2"), tmp_path / "socket"
    options = failing(disk, "qcow2", event=event, errno=28, once="on")
    with lamina_nbd(socket, *options):
        with opened(socket) as backend, pytest.raises(StorageError, match="No space left"):
            write_and_flush(backend)
        outcome, flushed = write_all(socket)  # it goes on
        assert {*outcome, flushed} == {None}
    assert_consistent(disk, leaks=True)
    assert_has_what_was_acknowledged(content_of(disk, "qcow2"), outcome)
