"""What the file protocol opens, what it refuses, and what it says then."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lamina.block.permissions import Perm
from lamina.errors import Refused, StorageError, UsageError
from lamina.protocols.file import DRIVER
from lamina.protocols.file.direct import DirectFileNode
from tests.unit.file.conftest import Opener


def test_missing_file(tmp_path: Path, open_file: Opener) -> None:
    with pytest.raises(StorageError) as caught:
        open_file(tmp_path / "nope")
    assert str(caught.value) == f"Could not open '{tmp_path}/nope': No such file or directory"


@pytest.mark.parametrize("writer", [False, True])
def test_only_regular_files(tmp_path: Path, open_file: Opener, writer: bool) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for a writer
    for name in ("/dev/null", str(tmp_path / "pipe"), *([] if writer else [str(tmp_path)])):
        with pytest.raises(UsageError) as caught:
            open_file(Path(name), writer=writer)
        assert str(caught.value) == f"'file' driver requires '{name}' to be a regular file"


def test_directories_are_not_written(tmp_path: Path, open_file: Opener) -> None:
    with pytest.raises(StorageError) as caught:
        open_file(tmp_path)
    assert str(caught.value) == f"Could not open '{tmp_path}': Is a directory"


def test_names_that_no_file_can_have(open_file: Opener) -> None:
    with pytest.raises(UsageError, match="requires a file name"):
        DRIVER.open(DRIVER.Options(filename=""), _context())
    with pytest.raises(UsageError, match="Invalid argument"):
        DRIVER.open(DRIVER.Options(filename="a\0b"), _context())


def _context() -> object:
    from types import SimpleNamespace

    from lamina.block.node import NodeOptions

    return SimpleNamespace(node_options=NodeOptions())


def test_prefix_is_stripped() -> None:
    assert DRIVER.parse_filename("file:a.raw") == {"filename": "a.raw"}
    assert DRIVER.parse_filename("file:a:b") == {"filename": "./a:b"}
    assert DRIVER.parse_filename("a.raw") == {"filename": "a.raw"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        ({"aio": "magic"}, "invalid parameter value: magic"),
        ({"locking": "maybe"}, "invalid parameter value: maybe"),
        ({"pr_manager": "pr0"}, "No persistent reservation manager with id 'pr0'"),
    ],
)
def test_bad_options(disk: Path, open_file: Opener, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_file(disk, options=options)
    assert str(caught.value) == message


def test_options_that_change_nothing_here(disk: Path, open_file: Opener) -> None:
    for aio in ("threads", "io_uring"):
        assert open_file(disk, options={"aio": aio, "drop_cache": False}).size == 1 << 20
    assert isinstance(open_file(disk, direct=True, options={"aio": "native"}), DirectFileNode)


def test_length_is_rounded_up_to_sectors(tmp_path: Path, open_file: Opener) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    node = open_file(path)
    assert node.size == 1024
    assert node.read(0, 1024) == b"x" * 1000 + bytes(24)
    node.write(512, b"y" * 512)
    assert path.read_bytes() == b"x" * 512 + b"y" * 512


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_permission_denied(disk: Path, open_file: Opener) -> None:
    disk.chmod(0o444)
    with pytest.raises(StorageError, match="Permission denied"):
        open_file(disk)


def test_auto_read_only_waits_for_a_writer(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = open_file(disk, writer=False, read_only=False, auto_read_only=True)
    assert node.read_only
    reader = node.used_by(None, "reader", Perm.CONSISTENT_READ, Perm.ALL)
    assert node.read(0, 512) == bytes(512)
    reader.change(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    assert not node.read_only
    node.write(0, b"x")


def test_auto_read_only_where_nobody_may_write(
    disk: Path, open_file: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(path: str, flags: int, *rest: object, **more: object) -> int:
        if path == str(disk) and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    node = open_file(disk, writer=False, read_only=False, auto_read_only=True)
    reader = node.used_by(None, "reader", Perm.CONSISTENT_READ, Perm.ALL)
    assert node.read(0, 512) == bytes(512)
    with pytest.raises(StorageError, match=r"Could not open .*: Permission denied"):
        reader.change(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    assert node.read_only
    assert node.read(0, 512) == bytes(512)


def test_read_only_files_are_not_written(disk: Path, open_file: Opener) -> None:
    node = open_file(disk, writer=False)
    with pytest.raises(Refused, match="Block node is read-only"):
        node.used_by(None, "writer", Perm.WRITE, Perm.ALL)
    with pytest.raises(StorageError):
        node.write(0, b"x")


@pytest.mark.skipif(sys.platform != "linux", reason="a file system without O_DIRECT")
def test_file_system_without_direct_access(open_file: Opener) -> None:
    with pytest.raises(StorageError) as caught:
        open_file(Path("/proc/cpuinfo"), writer=False, direct=True)
    message = "Could not open '/proc/cpuinfo': filesystem does not support O_DIRECT"
    assert str(caught.value) == message


def test_a_closed_file_reads_nothing(disk: Path, open_file: Opener) -> None:
    """Not even when another file gets the number of its descriptor."""
    node = open_file(disk)
    read = node.readv
    node.close()
    node.close()
    with open(__file__, "rb"), pytest.raises(StorageError):
        read([(0, memoryview(bytearray(16)))])


def test_info(disk: Path, open_file: Opener) -> None:
    node = open_file(disk)
    node.write(0, b"x" * 4096)
    node.flush()
    about = node.info()
    assert (about.format, about.filename, about.virtual_size) == ("file", str(disk), 1 << 20)
    assert about.actual_size == os.stat(disk).st_blocks * 512
    assert about.specific == {}
