"""Options that change while a qcow2 image is open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.session import Session
from lamina.errors import ImageUnsupported, LaminaError, UsageError
from lamina.formats.qcow2.layout import INCOMPAT_DIRTY

K = 1024


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qcow2")
    create_image(path, "qcow2", session=Session(), size=1024 * K)
    return path


@pytest.fixture
def disk(path: str) -> Iterator[Backend]:
    with Backend.open(path, session=Session(), writable=True) as disk:
        yield disk


def is_dirty(path: str) -> bool:
    header = Path(path).read_bytes()[:104]
    return bool(int.from_bytes(header[72:80], "big") & INCOMPAT_DIRTY)


def test_lazy_refcounts_on_and_off(path: str, disk: Backend) -> None:
    disk.write(0, b"1" * 64 * K)
    assert not is_dirty(path)
    disk.reopen_with({"lazy-refcounts": "on"})
    disk.write(64 * K, b"2" * 64 * K)
    assert is_dirty(path)
    disk.reopen_with({"lazy-refcounts": "off"})
    assert not is_dirty(path)
    disk.write(128 * K, b"3" * 64 * K)
    assert not is_dirty(path)
    assert disk.read(0, 192 * K) == b"1" * 64 * K + b"2" * 64 * K + b"3" * 64 * K


def test_discards_reach_the_file_once_they_are_wanted(path: str, disk: Backend) -> None:
    disk.write(0, b"1" * 512 * K)
    disk.flush()
    before = disk.node.file.info().actual_size
    disk.discard(0, 256 * K)
    assert disk.node.file.info().actual_size == before
    disk.reopen_with({"discard": "unmap"})
    disk.discard(256 * K, 256 * K)
    disk.flush()
    after = disk.node.file.info().actual_size
    assert before is not None
    assert after is not None
    assert after <= before - 256 * K


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"cluster_size": "4k"}, UsageError, "Cannot change the option 'cluster_size'"),
        ({"data-file": "x"}, UsageError, "Cannot change the option 'data-file'"),
        ({"lazy-refcounts": "x"}, UsageError, "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
        ({"l2-cache-size": "2M", "cache-size": "1M"}, UsageError, "l2-cache-size may not exceed"),
        ({"driver": "raw"}, UsageError, "Cannot change the option 'driver'"),
    ],
)
def test_what_cannot_change_leaves_everything_as_it_was(
    disk: Backend, changes: dict[str, str], kind: type[LaminaError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        disk.reopen_with({"discard": "unmap", **changes})
    assert not disk.node.options.unmap
    disk.write(0, b"still works")


def test_old_images_are_never_lazy(tmp_path: Path) -> None:
    path = str(tmp_path / "old.qcow2")
    create_image(path, "qcow2", session=Session(), size=64 * K, options={"compat": "0.10"})
    with Backend.open(path, session=Session(), writable=True) as disk:
        with pytest.raises(ImageUnsupported, match="Lazy refcounts require"):
            disk.reopen_with({"lazy-refcounts": "on"})
        disk.write(0, b"x")


def test_images_open_for_reading_change_as_well(path: str) -> None:
    with Backend.open(path, session=Session()) as disk:
        disk.reopen_with({"l2-cache-size": "1M", "overlap-check": "none"})
        assert disk.read(0, K) == bytes(K)
