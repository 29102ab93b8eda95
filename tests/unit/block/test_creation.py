from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lamina.block import creation
from lamina.block.session import Session
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.formats import raw


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(filename: str = "d", format: str = "raw", **how: Any) -> creation.Creation:
    return creation.prepare(filename, format, session=Session(warn=print), **how)


def test_a_raw_image_is_a_file_of_its_size() -> None:
    one = prepare(size=1000, options={"preallocation": "full"})
    assert one.settled() == [("size", "1000"), ("preallocation", "full")]
    assert not Path("d").exists()
    one.run()
    assert Path("d").read_bytes() == bytes(1024)
    assert one.format_options.size == 1000


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"format": "nope"}, "Unknown file format 'nope'"),
        ({"filename": "nope:d"}, "Unknown protocol 'nope'"),
        ({"filename": "null-co://"}, "Protocol driver 'null-co' does not support image creation"),
        ({"format": "null-co"}, "Format driver 'null-co' does not support image creation"),
        ({"options": {"foo": "1"}}, "Invalid parameter 'foo'"),
        ({}, "Image creation needs a size parameter"),
        ({"size": 1, "options": {"size": "1"}}, "The image size must be specified only once"),
        ({"options": {"size": "-1"}}, "Value '-1' is out of range for parameter 'size'"),
        ({"options": {"size": "1Z"}}, "Parameter 'size' expects a non-negative number below 2^64"),
        ({"size": 1 << 63}, "Invalid image size specified. Must be between 0 and "
         "9223372036854775807."),
        ({"backing_file": "x"}, "Backing file not supported for file format 'raw'"),
        ({"backing_format": "x"}, "Backing file format not supported for file format 'raw'"),
    ],
)
def test_what_is_refused_before_anything_is_written(how: dict[str, Any], error: str) -> None:
    with pytest.raises(LaminaError) as caught:
        prepare(**how)
    assert str(caught.value) == error
    assert list(Path().iterdir()) == []


def test_a_format_that_needs_the_file_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that write a header get an empty file, and a failure leaves none behind."""
    sizes = []

    def create(self: Any, options: Any, file: Any, context: Any) -> None:
        sizes.append(file.size)
        file.truncate(512)
        file.write(0, b"header")
        beside = context.create_beside("d.extent", 2048)
        assert (beside.size, beside.filename) == (2048, "d.extent")
        assert context.backing_node() is None
        if options.size == 13:
            raise StorageError.from_errno(27)

    monkeypatch.setattr(raw.RawDriver, "create", create)
    monkeypatch.setattr(raw.RawDriver, "new_file_size", lambda self, options: 0)
    prepare(size=512).run()
    assert sizes == [0]
    assert Path("d").read_bytes() == b"header".ljust(512, b"\0")
    with pytest.raises(StorageError) as caught:
        prepare(size=13).run()
    assert str(caught.value) == "The image size is too large for file format 'raw'"
    assert list(Path().iterdir()) == []
    assert not [name for name in os.listdir("/proc/self/fd") if _points_here(name)]


def _points_here(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(os.getcwd())
    except OSError:
        return False


def test_a_file_that_could_not_be_created() -> None:
    with pytest.raises(LaminaError) as caught:
        prepare(filename="nowhere/d", size=512).run()
    assert str(caught.value) == "Could not create 'nowhere/d': No such file or directory"


def test_help() -> None:
    assert creation.options_help("raw") == (
        "Supported raw options:\n"
        "  size=<size>            - Virtual disk size\n"
        "\n"
        "The protocol level may support further options.\n"
        "Specify the target filename to include those options."
    )
    assert creation.options_help("raw", "d").splitlines()[:3] == [
        "Supported options:",
        "  extent_size_hint=<size> - Extent size hint for the image file, 0 to disable",
        "  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)",
    ]
    with pytest.raises(UsageError, match="Unknown protocol 'nope'"):
        creation.options_help("raw", "nope:x")
    with pytest.raises(ImageUnsupported):
        creation.options_help("null-co")
