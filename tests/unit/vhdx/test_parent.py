"""Parents of differencing images, as files: found, refused, changed, emptied into."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.policy import Policy
from lamina.block.session import Session
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, Refused, StorageError
from lamina.formats.vhdx import DRIVER, locator
from lamina.formats.vhdx.parent import write_locator
from lamina.jobs.commit import commit, empty, writable_layer
from lamina.tools import img
from lamina.tools.tool import Tool
from lamina.units import MIB

SIZE = 5 * MIB


@pytest.fixture
def session() -> Session:
    return Session(warn=lambda text: None)


def new(path: Path, session: Session, parent: str | None = None, fill: bytes = b"") -> Path:
    options = {"block_size": "1M"}
    if parent is not None:
        options.update(backing_file=parent, backing_fmt="vhdx")
    create_image(str(path), "vhdx", session=session, options=options, size=SIZE)
    if fill:
        with opened(path, session, writable=True) as disk:
            disk.write(0, fill)
    return path


def opened(path: Path, session: Session, **how) -> Backend:
    return Backend.open(str(path), session=session, **how)


@pytest.fixture
def images(tmp_path: Path, session: Session) -> tuple[Path, Path]:
    """(base, child), the child in a directory beside."""
    base = new(tmp_path / "base.vhdx", session, fill=b"base" * MIB)
    (tmp_path / "children").mkdir()
    return base, new(tmp_path / "children/child.vhdx", session, "../base.vhdx")


def test_relative_to_the_child(images, session, tmp_path, monkeypatch):
    _, child = images
    monkeypatch.chdir("/")
    with opened(child, session) as disk:
        assert disk.read(0, 4) == b"base"
        about = disk.node.info()
    assert about.backing_filename == "../base.vhdx"
    assert about.full_backing_filename == str(child.parent / "../base.vhdx")
    (tmp_path / "moved").mkdir()
    for name in ("base.vhdx", "children"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with opened(tmp_path / "moved/children/child.vhdx", session) as disk:
        assert disk.read(0, 4) == b"base"


def test_the_gate(images, tmp_path):
    base, child = images
    for policy in (Policy.DENY, Policy.BESIDE):
        with pytest.raises(Refused):
            opened(child, Session(policy=policy))
    beside = new(tmp_path / "beside.vhdx", Session(), str(base.name))
    with opened(beside, Session(policy=Policy.BESIDE)) as disk:
        assert disk.read(0, 4) == b"base"
    with pytest.raises(Refused):
        opened(beside, Session(policy=Policy.DENY))


def test_inspecting_needs_no_parent(images):
    base, child = images
    base.unlink()
    info = lamina.inspect(child)
    assert (info.virtual_size, info.backing_filename) == (SIZE, "../base.vhdx")


def test_a_parent_that_is_gone(images, session):
    base, child = images
    base.unlink()
    with pytest.raises(StorageError, match=r"Could not open backing file: .*No such file"):
        opened(child, session)
    with opened(child, session, options={"backing": None}) as disk:
        assert disk.read(0, SIZE) == bytes(SIZE)


def test_the_next_path_is_tried(images, session):
    """As Windows writes them: relative, by volume, absolute."""
    base, child = images
    with opened(child, session, writable=True) as disk:
        mapping = disk.node.mapping
        entries = dict(mapping.image.parent)
        entries[locator.RELATIVE] = ".\\gone.vhdx"
        entries[locator.VOLUME] = "\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\base.vhdx"
        entries[locator.ABSOLUTE] = str(base)
        write_locator(mapping, entries)
    with opened(child, session) as disk:
        assert disk.read(0, 4) == b"base"
        assert disk.node.info().backing_filename == str(base)


def test_itself(tmp_path, session):
    first = new(tmp_path / "first.vhdx", session)
    second = new(tmp_path / "second.vhdx", session, "first.vhdx")
    first.unlink()
    second.rename(first)
    with pytest.raises(LaminaError, match="creates an infinite loop"):
        opened(first, session)


def test_a_parent_of_another_format(images, session):
    base, child = images
    base.write_bytes(bytes(MIB))
    with pytest.raises(ImageCorrupt, match="not in VHDX format"):
        opened(child, session)
    # Whoever says where and what it is knows better.
    options = {"backing.driver": "raw", "backing.file.filename": str(base)}
    with opened(child, session, options=options) as disk:
        assert disk.read(0, SIZE) == bytes(SIZE)


def test_a_parent_that_was_written_to(images, session):
    base, child = images
    with opened(base, session, writable=True) as disk:
        disk.read(0, 4)
    with opened(child, session) as disk:
        assert disk.read(0, 4) == b"base"
    with opened(base, session, writable=True) as disk:
        disk.write(0, b"BASE")
    with pytest.raises(ImageCorrupt, match="has changed since this image was made"):
        opened(child, session)
    options = {"backing.file.filename": str(base), "backing.driver": "vhdx"}
    with opened(child, session, options=options) as disk:
        assert disk.read(0, 4) == b"BASE"


def test_linked_again(images, session):
    base, child = images
    with opened(base, session, writable=True) as disk:
        disk.write(0, b"BASE")
    for name in ("../base.vhdx", str(base), "../base.vhdx"):
        with opened(child, session, writable=True, backing=False) as disk:
            DRIVER.change_backing_file(disk.node, name, "vhdx")
            assert disk.node.info().backing_filename == name
        with opened(child, session) as disk:
            assert disk.read(0, 4) == b"BASE"
            assert disk.node.info().backing_filename == name


def test_links_that_cannot_be(images, session, tmp_path):
    base, child = images
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with opened(child, session, writable=True) as disk:
        for name, format in (("../base.vhdx", "raw"), ("../raw", "vhdx")):
            with pytest.raises(ImageUnsupported):
                DRIVER.change_backing_file(disk.node, name, format)
        with pytest.raises(StorageError):
            DRIVER.change_backing_file(disk.node, "../gone.vhdx", "vhdx")
        assert disk.node.info().backing_filename == "../base.vhdx"
    with (
        opened(base, session, writable=True) as disk,
        pytest.raises(ImageUnsupported, match="cannot gain"),
    ):
        DRIVER.change_backing_file(disk.node, "children/child.vhdx", "vhdx")
    with opened(child, session) as disk:
        assert disk.read(0, 4) == b"base"


def test_commit_keeps_the_child_linked(images, session):
    base, child = images
    with opened(child, session, writable=True) as disk:
        disk.write(100, b"child")
        disk.write(3 * MIB, b"c" * MIB)
        disk.write_zeroes(MIB, MIB)
        expected = disk.read(0, SIZE)
        with writable_layer(disk, disk.node.backing) as target:
            commit(disk, target)
        empty(disk)
        assert disk.read(0, SIZE) == expected
    for path in (base, child):
        with opened(path, session) as disk:
            assert disk.read(0, SIZE) == expected
            assert DRIVER.check(disk.node, Fix(), lambda line: None).corruptions == 0





def test_converting_to_a_child(images, session, tmp_path):
    """Only what differs from the parent is written; the parent is opened to link to it."""
    base, child = images
    with opened(child, session, writable=True) as disk:
        disk.write(2 * MIB + 1000, b"c" * 700)
        expected = disk.read(0, SIZE)
    new = tmp_path / "new.vhdx"
    words = ["convert", "-O", "vhdx", "-o", "block_size=1M", "-B", str(base), "-F", "vhdx"]
    assert Tool("lamina-img").run(img.run, [*words, str(child), str(new)]) == 0
    with opened(new, session) as disk:
        assert disk.read(0, SIZE) == expected
        kinds = [(one.kind.name, one.length) for one in disk.node.extents(0, SIZE)]
    assert kinds == [("BELOW", 2 * MIB + 512), ("DATA", 1536), ("BELOW", 3 * MIB - 2048)]
