"""raw: the file itself, or a window onto it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.extents import Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.session import Session
from lamina.errors import ImageUnsupported, StorageError, UsageError
from lamina.formats.raw import DRIVER, RawCreateOptions, RawNode


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("d").write_bytes(bytes(range(256)) * 16)
    return tmp_path


def opened(options: Mapping[str, Any] | None = None, **how: Any) -> Backend:
    given = {"driver": "raw", "file.filename": "d", **(options or {})}
    how.setdefault("writable", True)
    return Backend.open(given, session=Session(warn=print), **how)


def test_without_a_window_calls_go_straight_to_the_file() -> None:
    with opened() as one:
        assert one.node.readv == one.node.file.readv
        assert one.node.writev == one.node.file.writev
        assert one.read(255, 2) == b"\xff\0"


def test_a_length_that_is_no_multiple_of_sectors_is_rounded_up() -> None:
    Path("d").write_bytes(b"x" * 1000)
    with opened() as one:
        assert one.size == 1024
        assert one.read(998, 26) == b"xx" + bytes(24)
        one.write(1022, b"yy")
    assert Path("d").read_bytes() == b"x" * 1000 + bytes(22) + b"yy"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"offset": 512}, 3584),
        ({"offset": 100}, 4096),
        ({"offset": 4096}, 0),
        ({"size": 1024}, 1024),
        ({"offset": "1k", "size": "1k"}, 1024),
    ],
)
def test_windows(options: dict[str, Any], size: int) -> None:
    with opened(options) as one:
        assert one.size == size
        assert isinstance(one.node, RawNode)
        start = one.node.window[0]
        if size:
            assert one.read(7, 1) == bytes([(start + 7) % 256])
            one.write(7, b"here")
            assert one.read(6, 5)[1:] == b"here"
            one.write_zeroes(8, 2)
            assert one.read(6, 5)[1:] == b"h\0\0e"
            assert Path("d").read_bytes()[start + 7 : start + 11] == b"h\0\0e"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"offset": 4608}, "Offset (4608) cannot be greater than size of the containing file "
         "(4096)"),
        ({"offset": 512, "size": 4096}, "The sum of offset (512) and size (4096) has to be smaller "
         "or equal to the  actual size of the containing file (4096)"),
        ({"size": 100}, "Specified size is not multiple of 512"),
    ],
)
def test_windows_that_do_not_fit(options: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(options)
    assert str(caught.value) == error


def test_nothing_behind_a_window_is_touched() -> None:
    before = Path("d").read_bytes()
    with opened({"offset": 512, "size": 1024}, discard="unmap") as one:
        for request in (
            lambda: one.node.writev([(1020, b"12345")]),
            lambda: one.node.write_zeroes(1020, 5),
            lambda: one.node.discard(1020, 5),
        ):
            with pytest.raises(StorageError, match="No space left"):
                request()
        with pytest.raises(ImageUnsupported, match="Cannot resize fixed-size raw disks"):
            one.truncate(512)
        one.discard(0, 1024)
    after = Path("d").read_bytes()
    assert (after[:512], after[1536:]) == (before[:512], before[1536:])


def test_extents_are_those_of_the_file() -> None:
    with open("d", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 18)
        file.write(b"x" * 65536)
    for offset in (0, 65536):
        with opened({"offset": offset}) as one:
            found = one.extents(0, one.size)
            for extent in found:
                assert extent.node is one.node.file
                assert extent.host_offset == extent.guest_offset + offset
            assert sum(extent.length for extent in found) == one.size
            assert [e.kind for e in found if e.guest_offset <= (1 << 18) - offset < e.end] == [
                Kind.DATA
            ]
            columns = list(one.node.columns(0, one.size))
            assert sum(int(piece.length.sum()) for piece in columns) == one.size


def test_resizing() -> None:
    with opened({"offset": 512}) as one:
        one.truncate(8192, Preallocation.FULL)
        assert one.size == 8192
        assert Path("d").stat().st_size == 8704
        one.truncate(512)
        assert Path("d").stat().st_size == 1024
        with pytest.raises(UsageError, match="Disk size too large for the chosen offset"):
            one.truncate((1 << 63) - 512)


def test_durable_writes_reach_the_file_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened({"offset": 512}) as one:
        seen: list[WriteFlags] = []
        monkeypatch.setattr(one.node.file, "writev", lambda requests, flags: seen.append(flags))
        one.writev([(0, b"x")], WriteFlags.FUA)
        assert seen == [WriteFlags.FUA]


def test_measure() -> None:
    result = DRIVER.measure(RawCreateOptions(1000), None, None)  # type: ignore[arg-type]
    assert (result.required, result.fully_allocated) == (1024, 1024)
    with opened() as one:
        result = DRIVER.measure(RawCreateOptions(), one.node, None)  # type: ignore[arg-type]
    assert (result.required, result.fully_allocated) == (4096, 4096)


@pytest.mark.peer
@pytest.mark.parametrize("length", [0, 1, 511, 512, 1000, 4097])
def test_qemu_sees_the_same_size(length: int) -> None:
    Path("d").write_bytes(b"x" * length)
    said = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "raw", "d"],
        capture_output=True,
        check=True,
    )
    with opened(writable=False) as one:
        assert one.size == json.loads(said.stdout)["virtual-size"]
