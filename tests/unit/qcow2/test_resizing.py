"""Disks that shrink and grow, again and again, in every state that an image can be in.

Whatever is cut off, taken beforehand, shared with a snapshot, given back late or left by a request
that failed: no table names what lies behind the end of the file, as it stands after each step.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from lamina.block.driver import Fix
from lamina.block.info import SnapshotInfo
from lamina.block.limits import Preallocation, WriteFlags
from lamina.engine.disk import Disk
from lamina.errors import LaminaError, StorageError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.mapping import Qcow2Mapping
from lamina.formats.qcow2.options import AmendOptions
from lamina.testing.memory import MemoryFile

from .features import FEATURES, Choice, accepted, compresses
from .images import make, open_image, verify
from .test_model import Images, show_to_qemu

KIB = 1 << 10
RUNS = int(os.environ.get("LAMINA_RESIZE_RUNS", 40))
STEPS = 25
PARTS = 2
"""They run side by side."""
SAMPLE = 10
"""One image in so many is shown to QEMU."""
CHOICES: dict[str, tuple[Any, ...]] = {
    **FEATURES,
    "cluster_size": (512, 512, KIB, KIB, 4 * KIB, 16 * KIB),
    "encrypt_format": (None,),
    "snapshots": (0,),
    "bitmaps": (False,),
    "data_file": (None, None, None, "data", "raw"),
    "preallocation": ("metadata", "metadata", "falloc", "full", "off"),
}
LATER = ("off", "off", "metadata", "metadata", "falloc", "full")


def choose(rng: random.Random) -> Choice:
    while True:
        choice = {name: rng.choice(values) for name, values in CHOICES.items()}
        if accepted(choice):
            return choice


class Resizing:
    """One image, and what it reads as."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.images = Images()
        self.choice = choose(rng)
        self.unit = self.choice["cluster_size"]
        runtime = {}
        if self.choice["compat"] == "1.1" and rng.random() < 0.2:
            runtime["discard-no-unref"] = "on"
        self.images.choose(self.choice, runtime)
        # Several tables where clusters are small.
        self.most = min(self.unit * rng.choice((5, 41, 150)), 160 * KIB)
        size = self._size()
        backing = None
        if self.choice["backing"]:
            backing = self._pattern(self._size())
        self.disk = self.images.make(size, backing)
        self.content = bytearray((backing or b"").ljust(size, b"\0")[:size])
        self.snapshots: dict[str, bytes] = {}
        self.log = [str((size, self.choice, runtime))]

    # -- drawing ---------------------------------------------------------------------------------

    def _size(self) -> int:
        size = self.rng.randint(1, self.most // 512) * 512
        return size if self.rng.random() < 0.5 else -(-size // self.unit) * self.unit

    def _pattern(self, length: int) -> bytes:
        seed = self.rng.randint(1, 255)
        return bytes((seed + at // 16) % 255 + 1 for at in range(length))

    def _range(self, most: int = 1 << 62) -> tuple[int, int]:
        size = len(self.content)
        points = sorted(self.rng.randint(0, size // 512) * 512 for _ in range(2))
        if self.rng.random() < 0.6:
            points = [min(-(-at // self.unit) * self.unit, size) for at in points]
        start, end = points
        return start, min(end - start, most)

    @property
    def mapping(self) -> Qcow2Mapping:
        assert isinstance(self.disk, Disk)
        mapping = self.disk.mapping
        assert isinstance(mapping, Qcow2Mapping)
        return mapping

    # -- steps -----------------------------------------------------------------------------------

    def shrink(self) -> None:
        size = self.rng.randint(1, len(self.content) // 512) * 512
        if self.rng.random() < 0.5:
            size = max(len(self.content) - self.rng.randint(1, 3 * self.unit // 512) * 512, 512)
        self._shrink(size)

    def _shrink(self, size: int) -> None:
        if self.mapping.snapshots and self.mapping.header.version < 3:
            return
        if size < len(self.content):
            self.disk.truncate(size)
            del self.content[size:]

    def shrink_twice(self) -> None:
        self.shrink()
        self.shrink()

    def shrink_under_a_read(self) -> None:
        """What a read still looks at is given back later than the file is cut."""
        pins = self.mapping.metadata.pins
        token = pins.enter()
        try:
            self.shrink()
        finally:
            pins.leave(token)
        if self.rng.random() < 0.5:
            self.shrink()

    def grow(self) -> None:
        if self.mapping.snapshots and self.mapping.header.version < 3:
            return
        size = self._size()
        if size <= len(self.content):
            return
        mode = Preallocation(self.rng.choice(LATER))
        if self.images.backing is not None and not self.choice["extended_l2"]:
            mode = Preallocation.OFF
        self.log[-1] += f" {mode} {size}"
        self.disk.truncate(size, mode, zeroed=True)
        self.content.extend(bytes(size - len(self.content)))

    def write(self) -> None:
        offset, length = self._range(5 * self.unit)
        data = self._pattern(length)
        self.disk.writev([(offset, memoryview(data))])
        self.content[offset : offset + length] = data

    def write_compressed(self) -> None:
        refcount_bits = self.mapping.header.refcount_bits
        if not compresses({**self.choice, "refcount_bits": refcount_bits}):
            return
        if not self.disk.supports_compressed_writes:
            return
        start = self.rng.randrange(-(-len(self.content) // self.unit)) * self.unit
        end = min(start + self.rng.randint(1, 3) * self.unit, len(self.content))
        data = self._pattern(end - start)
        self.disk.write_compressed([(start, memoryview(data))])
        self.content[start:end] = data

    def zero(self) -> None:
        offset, length = self._range()
        unmap = self.rng.random() < 0.5
        self.disk.write_zeroes(
            offset, length, WriteFlags.MAY_UNMAP if unmap else WriteFlags.NONE
        )
        self.content[offset : offset + length] = bytes(length)

    def discard(self) -> None:
        offset, length = self._range()
        self.disk.discard(offset, length)
        self.content[offset : offset + length] = self.disk.read(offset, length)

    def take_snapshot(self) -> None:
        most = min((1 << self.mapping.header.refcount_bits) - 3, 3)
        if self.choice["data_file"] or len(self.snapshots) >= most:
            return
        name = str(len(self.log))
        # Compressed clusters may be shared too often already.
        with suppress(LaminaError):
            DRIVER.create_snapshot(self.disk, SnapshotInfo("", name, 0, 1, 0, 0, 0))
            self.snapshots[name] = bytes(self.content)

    def apply_snapshot(self) -> None:
        if self.snapshots:
            name = self.rng.choice(sorted(self.snapshots))
            with suppress(LaminaError):
                DRIVER.apply_snapshot(self.disk, name)
                self.content = bytearray(self.snapshots[name])

    def delete_snapshot(self) -> None:
        if self.snapshots:
            name = self.rng.choice(sorted(self.snapshots))
            DRIVER.delete_snapshot(self.disk, name)
            del self.snapshots[name]

    def flush(self) -> None:
        self.disk.flush()

    def reopen(self) -> None:
        self.disk = self.images.reopen(self.disk)

    def amend(self) -> None:
        bits = self.rng.choice(FEATURES["refcount_bits"])
        with suppress(LaminaError):
            options = AmendOptions(refcount_bits=bits)
            DRIVER.amend(self.disk, options, lambda part: None, force=False)

    def change_bitmaps(self) -> None:
        with suppress(LaminaError):
            if self.rng.random() < 0.6:
                DRIVER.add_bitmap(self.disk, f"b{self.rng.randint(0, 2)}", None)
            else:
                DRIVER.remove_bitmap(self.disk, f"b{self.rng.randint(0, 2)}")

    def empty(self) -> None:
        backing = self.images.backing
        if backing is not None:
            size = len(self.content)
            DRIVER.make_empty(self.disk)
            self.content = bytearray(backing.ljust(size, b"\0")[:size])

    def repair(self) -> None:
        self.disk.flush()
        found = DRIVER.check(self.disk, Fix(leaks=True, errors=True), lambda line: None)
        assert not found.corruptions

    def fail(self) -> None:
        """A step from the middle of which on all requests of a kind fail."""
        kinds, most = self.rng.choice(
            ((("write", "zero"), 12), (("truncate",), 1), (("flush",), 6))
        )
        left = self.rng.randint(0, most)

        def fails(kind: str, offset: int, length: int) -> None:
            nonlocal left
            if kind in kinds:
                left -= 1
                if left < 0:
                    raise StorageError.from_errno(errno.ENOSPC)

        step = self.rng.choice((self.shrink, self.shrink, self.grow, self.write, self.zero))
        self.log[-1] += f" {step.__name__} {kinds} {left}"
        self.images.file.hook = fails
        try:
            with suppress(LaminaError):
                step()
        finally:
            self.images.file.hook = None
        # It may be done in part, and the length is what it was or what it was to be.
        self.content = bytearray(self.disk.read(0, self.disk.size))

    # -- the whole -------------------------------------------------------------------------------

    def run(self) -> None:
        steps: list[tuple[Callable[[], None], int]] = [
            (self.shrink, 4),
            (self.shrink_twice, 2),
            (self.shrink_under_a_read, 2),
            (self.grow, 7),
            (self.write, 4),
            (self.write_compressed, 2),
            (self.zero, 3),
            (self.discard, 3),
            (self.take_snapshot, 2),
            (self.apply_snapshot, 1),
            (self.delete_snapshot, 1),
            (self.flush, 1),
            (self.reopen, 1),
            (self.amend, 1),
            (self.change_bitmaps, 1),
            (self.empty, 1),
            (self.repair, 1),
            (self.fail, 2),
        ]
        kinds, weights = zip(*steps, strict=True)
        self.look()
        for _ in range(STEPS):
            step = self.rng.choices(kinds, weights)[0]
            self.log.append(step.__name__)
            step()
            self.look()
        self.end()

    def look(self) -> None:
        """The file as a power cut would leave it, then the disk."""
        errors = verify(bytes(self.images.file.content)).errors
        if self.mapping.metadata.lazy_counts:
            # Counts may be wrong then, what tables name is there all the same.
            errors = [one for one in errors if "behind the end" in one]
        assert errors == []
        assert self.disk.read(0, len(self.content)) == self.content
        if self.rng.random() < 0.4:
            self.disk.flush()
            self.images.check(self.disk, bytes(self.content))

    def end(self) -> None:
        assert self.disk.size == len(self.content)
        assert self.disk.read(0, self.disk.size) == self.content
        self.images.finish(self.disk)
        for name, content in self.snapshots.items():
            assert self.images.look(name) == content


@pytest.mark.parametrize("part", range(PARTS))
def test_resizing(part: int) -> None:
    for seed in range(part, RUNS, PARTS):
        resizing = Resizing(seed)
        try:
            resizing.run()
            if seed // PARTS % SAMPLE == 0 and shutil.which("qemu-img"):
                show_to_qemu(resizing.images, bytes(resizing.content))
        except Exception as error:
            error.add_note("\n".join([f"seed {seed}", *resizing.log]))
            raise


def test_nothing_is_written_behind_the_end() -> None:
    """The file is cut, and an empty write touches what the disk has lost."""
    unit = KIB
    file = MemoryFile(make(41 * unit, cluster_size=unit, preallocation="metadata"))
    disk = open_image(file)
    for size in (30, 20, 40):
        disk.truncate(size * unit, zeroed=True)
    for cluster in range(20, 30):
        disk.writev([(cluster * unit + 512, memoryview(b""))])
    disk.flush()
    assert verify(bytes(file.content)) == ([], [])
    disk.close()


def test_a_file_that_cannot_be_extended() -> None:
    """Nothing is mapped to what is not there; later, when there is room, it can be."""
    unit = KIB
    file = MemoryFile(make(4 * unit, cluster_size=unit))
    disk = open_image(file)

    def full(kind: str, offset: int, length: int) -> None:
        if kind == "truncate":
            raise StorageError.from_errno(errno.ENOSPC)

    file.hook = full
    with pytest.raises(StorageError, match="No space left on device"):
        disk.truncate(40 * unit, Preallocation.METADATA)
    file.hook = None
    assert disk.size == 4 * unit
    disk.flush()
    assert verify(bytes(file.content)) == ([], [])
    disk.truncate(40 * unit, Preallocation.METADATA)
    assert len(file.content) >= 40 * unit
    disk.close()
    assert verify(bytes(file.content)) == ([], [])


@pytest.mark.parametrize(
    ("refcount_bits", "start"),
    [(8, 4 * KIB), (64, 4 * KIB), (64, 2020 * KIB)],
    ids=["wide blocks", "narrow blocks", "refcount table"],
)
def test_storage_that_is_full(refcount_bits: int, start: int) -> None:
    """Whatever was acknowledged can be flushed: new tables, of counts too, had room by then."""
    unit, size, step = 512, start + 200 * KIB, 4 * KIB
    content = make(size, cluster_size=unit, refcount_bits=refcount_bits)
    for room in range(start, start + 80 * KIB, unit if start < 64 * KIB else 3 * unit):
        file = MemoryFile(content)
        disk = open_image(file)

        def full(kind: str, offset: int, length: int, room: int = room) -> None:
            if kind in ("write", "truncate") and offset + length > room:
                raise StorageError.from_errno(errno.ENOSPC)

        kept = start // 5 * 4 // unit * unit
        disk.write(0, b"x" * kept)
        file.hook = full
        with suppress(StorageError):
            while kept < size:
                disk.write(kept, b"x" * step)
                kept += step
        assert kept < size, "the storage is never full"
        disk.flush()
        again = open_image(MemoryFile(bytes(file.content)))
        assert again.read(0, kept) == b"x" * kept
        assert verify(bytes(file.content)).errors == []
