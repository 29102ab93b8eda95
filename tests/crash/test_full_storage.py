"""Storage that runs out of space: what was acknowledged can be flushed, whatever came afterwards.

Files are sparse here as they are on disks: room is taken when something is written, not when the
file is made longer. So the tables of an image may be holes until their first entry is set.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from lamina.block.creation import create_image
from lamina.block.extents import Extent, Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, WriteRequest
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import StorageError
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB

PAGE = 4096
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


class SmallStorage(MemoryFile):
    """A sparse file on storage that has room for so many bytes more."""

    def __init__(self, content: bytes, room: int) -> None:
        """Pages of zeroes are holes."""
        super().__init__(content, WRITABLE)
        self.pages = {
            page
            for page in range(-(-len(content) // PAGE))
            if any(content[page * PAGE : (page + 1) * PAGE])
        }
        self.most = len(self.pages) + room // PAGE

    def _take(self, offset: int, length: int) -> None:
        pages = self.pages | set(range(offset // PAGE, -(-(offset + length) // PAGE)))
        if len(pages) > self.most:
            raise StorageError.from_errno(errno.ENOSPC)
        self.pages = pages

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        for offset, data in requests:
            self._take(offset, len(data))
            super().writev([(offset, data)], flags)

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        if not flags & WriteFlags.MAY_UNMAP:
            self._take(offset, length)
        super().write_zeroes(offset, length, flags)

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        if preallocation is not Preallocation.OFF and size > self.size:
            self._take(self.size, size - self.size)
        super().truncate(size, preallocation, exact=exact, zeroed=zeroed)
        self.pages = {page for page in self.pages if page * PAGE < size}

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [
            Extent(at, PAGE, Kind.DATA if at // PAGE in self.pages else Kind.ZERO, self, at)
            for at in range(offset, offset + length, PAGE)
        ]


class Image(NamedTuple):
    format: str
    options: dict[str, str]
    stride: int
    """From a write to the next: they need parts of tables, or tables, of their own."""
    unit: int = 4 * KIB
    below: bool = False


WRITES = 40
ROOMS = (40, 100, 700)
BELOW = random.Random(1).randbytes(64 * KIB)
IMAGES = {
    "qcow": Image("qcow", {}, 2 * MIB),
    "qed": Image("qed", {"cluster_size": "4k", "table_size": "1"}, 2 * MIB),
    "vdi": Image("vdi", {}, MIB),
    "vpc": Image("vpc", {}, 2 * MIB),
    "vpc below": Image("vpc", {}, 2 * MIB, below=True),
    "vhdx": Image("vhdx", {"block_size": "1M", "block_state_zero": "off"}, MIB),
    "vhdx far": Image("vhdx", {"block_size": "1M", "block_state_zero": "off"}, 600 * MIB),
    "vhdx below": Image("vhdx", {"block_size": "1M"}, MIB, below=True),
    "parallels": Image("parallels", {"cluster_size": "4k"}, 4 * MIB),
    "vmdk": Image("vmdk", {}, 64 * MIB),
    "vmdk zeroes": Image("vmdk", {"zeroed_grain": "on"}, 64 * MIB),
    "vmdk below": Image("vmdk", {}, 64 * MIB, below=True),
    "stream": Image("vmdk", {"subformat": "streamOptimized"}, 32 * MIB, unit=64 * KIB),
}


def created(path: Path, image: Image) -> tuple[bytes, bytes]:
    """A new image, and the one below."""
    session = Session(warn=lambda text: None)
    size = image.stride * WRITES
    if not image.below:
        create_image(str(path), image.format, session=session, options=image.options, size=size)
        return path.read_bytes(), b""
    base = path.with_name("base")
    create_image(str(base), image.format, session=session, options=image.options, size=size)
    options = {"backing_file": "base", "backing_fmt": image.format}
    create_image(str(path), image.format, session=session, options=options)
    return path.read_bytes(), base.read_bytes()


def opened(file: Node, format: str, below: bytes) -> Node:
    backing = None
    if below:
        options = NodeOptions(read_only=True, filename="below")
        backing = opened(MemoryFile(below, options), format, b"")
    made = driver(format)
    return made.open(made.Options(), NodesContext(file, backing=backing))


@pytest.mark.parametrize("name", list(IMAGES))
@pytest.mark.parametrize("room", ROOMS)
def test_what_was_acknowledged_is_flushed(tmp_path: Path, name: str, room: int) -> None:
    """``room``: in KiB; only the most may be enough."""
    image = IMAGES[name]
    content, below = created(tmp_path / "image", image)
    extra = 508 * KIB if image.format == "vhdx" else 0
    file = SmallStorage(content, room * KIB + extra)
    disk = opened(file, image.format, below)
    rng = random.Random(room)
    written: dict[int, bytes] = {}
    failures: list[int | None] = []
    for number in range(WRITES):
        offset, data = number * image.stride, rng.randbytes(image.unit)
        try:
            disk.write(offset, data)
            written[offset] = data
        except StorageError as error:
            failures.append(error.errno)
            if len(failures) == 2:
                break
    assert set(failures) <= {errno.ENOSPC}
    assert failures or room == max(ROOMS)
    assert written or room == min(ROOMS)
    disk.flush()
    flushed = bytes(file.content)
    disk.close()
    for state in (flushed, bytes(file.content)):
        disk = opened(MemoryFile(state), image.format, below)
        for offset, data in written.items():
            assert disk.read(offset, image.unit) == data
        disk.close()


@pytest.mark.parametrize("name", ["vhdx far", "vmdk zeroes"])
def test_zeroes_that_were_acknowledged_are_flushed(tmp_path: Path, name: str) -> None:
    """They need entries, too."""
    image = IMAGES[name]
    content, _ = created(tmp_path / "image", image)
    file = SmallStorage(content, 40 * KIB + (508 * KIB if image.format == "vhdx" else 0))
    disk = opened(file, image.format, b"")
    failures = 0
    for number in range(WRITES):
        try:
            disk.write_zeroes(number * image.stride, MIB)
        except StorageError:
            failures += 1
    assert 0 < failures < WRITES
    disk.flush()
    disk.close()


def test_it_can_be_told(tmp_path: Path) -> None:
    """The proof can fail: without room for its tables an image loses what it has acknowledged."""
    from lamina.engine.tables import TableCache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableCache, "hold", lambda *what: None)
        with pytest.raises((StorageError, AssertionError)):
            test_what_was_acknowledged_is_flushed(tmp_path, "vmdk", 100)
