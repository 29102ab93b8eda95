"""Persistent bitmaps in an open image: what they record, and what the file says meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lamina.block.dirty import DirtyBitmap
from lamina.block.driver import Fix, find_bitmap
from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, Refused, StorageError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.bitmap_layout import AUTO, IN_USE, BitmapEntry, pack_directory
from lamina.formats.qcow2.bitmap_storage import read_bitmaps, read_directory
from lamina.formats.qcow2.extensions import BitmapsExtension
from lamina.formats.qcow2.layout import Header
from lamina.testing.memory import MemoryFile

from .images import make, open_image, read_only, verify

KIB = 1 << 10
SIZE = 300 * KIB + 512
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def image(*names: str, size: int = SIZE, granularity: int = 512, **options: object) -> MemoryFile:
    """An image with these bitmaps."""
    file = MemoryFile(make(size, **options))
    with opened(file) as disk:
        for name in names:
            DRIVER.add_bitmap(disk, name, granularity)
    return MemoryFile(file.content)


@contextmanager
def opened(file: MemoryFile) -> Iterator[Disk]:
    disk = open_image(file, node_options=WRITABLE)
    yield disk
    disk.close()
    assert disk.context.warnings == []  # type: ignore[attr-defined]


def directory(content: bytes | bytearray) -> dict[str, BitmapEntry]:
    header = Header.parse(bytes(content))
    if header.bitmaps is None or not header.autoclear_features & 1:
        return {}
    return {entry.name: entry for entry in read_directory(read_only(content), header.bitmaps)}


def flags(content: bytes | bytearray) -> dict[str, int]:
    return {name: entry.flags for name, entry in directory(content).items()}


def ranges(content: bytes | bytearray, name: str) -> list[tuple[int, int]]:
    return list(find_bitmap(open_image(read_only(bytes(content))), name).ranges())


# -- what they record ------------------------------------------------------------------------------


class Model:
    """Bitmaps beside sets of granules."""

    def __init__(self, seed: int, cluster_size: int) -> None:
        self.rng = random.Random(seed)
        self.file = MemoryFile(make(SIZE, cluster_size=cluster_size))
        self.disk = open_image(self.file, node_options=WRITABLE)
        self.unit = cluster_size
        self.sets: dict[str, set[int]] = {}
        """The 512-byte blocks of dirty granules."""
        self.granularity: dict[str, int] = {}
        self.enabled: dict[str, bool] = {}

    def touched(self, name: str, offset: int, length: int) -> set[int]:
        unit = self.granularity[name]
        start, end = offset // unit * unit, -(-(offset + length) // unit) * unit
        return set(range(start // 512, min(end, self.disk.size) // 512))

    def mark(self, offset: int, length: int) -> None:
        for name, blocks in self.sets.items():
            if self.enabled[name] and length:
                blocks |= self.touched(name, offset, length)

    def span(self) -> tuple[int, int]:
        size = self.disk.size
        offset = self.rng.randrange(size)
        length = self.rng.choice([1, 512, 3 * KIB, 20 * KIB])
        return offset, min(length, size - offset)

    def step(self) -> None:
        rng, disk = self.rng, self.disk
        names = list(self.sets)
        offset, length = self.span()
        action = rng.choice(
            ["write"] * 5
            + ["batch", "zero", "discard", "compressed", "flush", "resize", "store"]
            + ["add", "remove", "clear", "enable", "disable", "merge", "reopen", "read-only"]
        )
        if action == "write":
            disk.write(offset, rng.randbytes(length))
            self.mark(offset, length)
        elif action == "batch":
            spans = [(at, 300) for at in rng.sample(range(0, disk.size - 600, 1000), 3)]
            disk.writev([(at, bytes(300)) for at, _ in spans])
            for span in spans:
                self.mark(*span)
        elif action == "zero":
            disk.write_zeroes(offset, length, rng.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP]))
            self.mark(offset, length)
        elif action == "discard":
            disk.discard(offset, length)
            self.mark(offset, length)
        elif action == "compressed":
            start = offset // self.unit * self.unit
            end = min(start + self.unit, disk.size)
            disk.write_compressed([(start, b"c" * (end - start))])
            self.mark(start, end - start)
        elif action == "flush":
            disk.flush()
        elif action == "store":
            DRIVER.store_bitmaps(disk)
        elif action == "resize":
            disk.truncate(rng.randrange(SIZE // 512, 2 * SIZE // 512) * 512, zeroed=True)
            for blocks in self.sets.values():
                blocks &= set(range(disk.size // 512))
            self.grown()
        elif action == "reopen":
            self.reopen()
        elif action == "read-only":
            disk.reopen(read_only=True)
            disk.reopen(read_only=False)
        elif action == "add" and len(names) < 4:
            name = f"b{rng.randrange(1000)}" if rng.random() < 0.8 else "x" * 500
            if name not in self.sets:
                self.granularity[name] = rng.choice([512, 4 * KIB, 64 * KIB, 1 << 20])
                DRIVER.add_bitmap(disk, name, self.granularity[name])
                self.sets[name], self.enabled[name] = set(), True
        elif names and action in ("remove", "clear", "enable", "disable", "merge"):
            self.change(action, rng.choice(names), rng.choice(names))

    def grown(self) -> None:
        """The last granule of the shorter disk reaches into what is new of it."""
        for name, blocks in self.sets.items():
            for block in list(blocks):
                blocks |= self.touched(name, block * 512, 512)

    def change(self, action: str, name: str, other: str) -> None:
        disk = self.disk
        if action == "remove":
            DRIVER.remove_bitmap(disk, name)
            del self.sets[name], self.enabled[name]
        elif action == "clear":
            DRIVER.clear_bitmap(disk, name)
            self.sets[name].clear()
        elif action == "merge":
            DRIVER.merge_bitmap(disk, name, disk, other)
            for block in list(self.sets[other]):
                self.sets[name] |= self.touched(name, block * 512, 512)
        else:
            DRIVER.enable_bitmap(disk, name, action == "enable")
            self.enabled[name] = action == "enable"

    def reopen(self) -> None:
        self.disk.close()
        self.check(open_image(read_only(bytes(self.file.content))))
        verdict = verify(bytes(self.file.content))
        assert verdict == ([], [])
        for name, found in flags(self.file.content).items():
            assert found == (AUTO if self.enabled[name] else 0)
        self.file = MemoryFile(self.file.content)
        self.disk = open_image(self.file, node_options=WRITABLE)

    def check(self, disk: Disk) -> None:
        assert {one.name for one in disk.dirty_bitmaps} == set(self.sets)
        for one in disk.dirty_bitmaps:
            assert one.granularity == self.granularity[one.name]
            assert one.enabled == self.enabled[one.name]
            found = {
                block
                for offset, length in one.ranges()
                for block in range(offset // 512, -(-(offset + length) // 512))
            }
            assert found == self.sets[one.name], one.name


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
@pytest.mark.parametrize("seed", range(6))
def test_the_set_of_what_was_touched(seed: int, cluster_size: int) -> None:
    model = Model(seed, cluster_size)
    for _ in range(70):
        model.step()
        model.check(model.disk)
    model.reopen()
    model.disk.close()


@pytest.mark.parametrize("unit", [512, 64 * KIB])
def test_whole_clusters_of_bits(unit: int) -> None:
    """Clusters whose bits are all equal take no space."""
    size = 512 * 8 * unit * 3
    file = image("b", size=size, cluster_size=unit)
    with opened(file) as disk:
        bitmap = find_bitmap(disk, "b")
        DRIVER.enable_bitmap(disk, "b", True)
        bitmap.set(0, size // 3)
        bitmap.set(size - 512, 512)
    content = bytes(file.content)
    place = directory(content)["b"].table_offset
    table = [int.from_bytes(content[place + n * 8 :][:8], "big") for n in range(3)]
    assert table[:2] == [1, 0]
    assert table[2] > 1
    assert ranges(content, "b") == [(0, size // 3), (size - 512, 512)]
    assert verify(content) == ([], [])


def test_of_large_bitmaps_only_what_changed_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.formats.qcow2.bitmap_storage.LARGE", 4 * 16 * KIB)
    unit = 16 * KIB
    size = 512 * 8 * unit * 12
    file = image("b", "other", size=size, cluster_size=unit)
    with opened(file) as disk:
        DRIVER.enable_bitmap(disk, "b", True)
        bitmap = find_bitmap(disk, "b")
        for start in range(0, size, 4 * unit * 512):
            bitmap.set(start, 512)
    before = bytes(file.content)
    dirty = ranges(before, "b")
    with opened(file) as disk:
        disk.write(3 * 512, b"x")
    after = bytes(file.content)
    assert verify(after) == ([], [])
    assert ranges(after, "b") == sorted([*dirty, (3 * 512, 512)])

    def table(content: bytes) -> list[int]:
        place = directory(content)["b"].table_offset
        return [int.from_bytes(content[place + n * 8 :][:8], "big") for n in range(12)]

    assert table(before)[1:] == table(after)[1:]
    assert table(before)[0] != table(after)[0]
    # One that does not change at all is not even read.
    with opened(file) as disk:
        DRIVER.clear_bitmap(disk, "other")
        file.calls.clear()
        find_bitmap(disk, "other").set(0, 512)
    assert table(bytes(file.content)) == table(after)
    assert verify(bytes(file.content)) == ([], [])


# -- what the file says meanwhile ------------------------------------------------------------------


def test_in_use_from_the_first_change_on() -> None:
    file = image("on", "off")
    disk = open_image(file, node_options=WRITABLE)
    DRIVER.enable_bitmap(disk, "off", False)
    DRIVER.store_bitmaps(disk)
    before = bytes(file.content)
    assert flags(before) == {"on": AUTO, "off": 0}
    disk.read(0, 512)
    assert file.content == before
    wrote = []
    file.hook = lambda kind, offset, length: (
        wrote.append(flags(file.content)["on"]) if kind == "write" and length == 512 else None
    )
    disk.write(0, b"x" * 512)
    assert wrote == [AUTO | IN_USE]
    file.hook = None
    # What does not record is not outdated.
    assert flags(file.content) == {"on": AUTO | IN_USE, "off": 0}
    assert disk.info().specific["bitmaps"] == [  # type: ignore[index]
        {"flags": [], "name": "off", "granularity": 512},
        {"flags": ["in-use", "auto"], "name": "on", "granularity": 512},
    ]
    disk.flush()
    crashed = bytes(file.content)
    disk.close()
    assert flags(file.content) == {"on": AUTO, "off": 0}
    after = open_image(read_only(crashed))
    assert [one.inconsistent for one in after.dirty_bitmaps] == [False, True]


def test_in_use_again_after_storing() -> None:
    file = image("b")
    disk = open_image(file, node_options=WRITABLE)
    for again in range(3):
        disk.write(again * 4096, b"x")
        assert flags(file.content) == {"b": AUTO | IN_USE}
        if again == 1:
            disk.reopen(read_only=True)
            assert flags(file.content) == {"b": AUTO}
            disk.reopen(read_only=False)
        else:
            DRIVER.store_bitmaps(disk)
            assert flags(file.content) == {"b": AUTO}
    disk.close()
    assert ranges(file.content, "b") == [(0, 512), (4096, 512), (8192, 512)]


def test_in_use_before_other_changes() -> None:
    file = image("a", "b")
    disk = open_image(file, node_options=WRITABLE)
    DRIVER.merge_bitmap(disk, "a", disk, "b")
    assert flags(file.content) == {"a": AUTO | IN_USE, "b": AUTO}
    DRIVER.clear_bitmap(disk, "b")
    assert flags(file.content) == {"a": AUTO | IN_USE, "b": AUTO | IN_USE}
    disk.close()
    assert flags(file.content) == {"a": AUTO, "b": AUTO}


def test_nothing_is_written_where_nothing_changed() -> None:
    file = image("a", "b")
    with opened(file) as disk:
        file.calls.clear()
        assert list(find_bitmap(disk, "a").ranges()) == []
    assert "write" not in file.calls


def test_removing_the_last_one() -> None:
    file = image("a", "b")
    with opened(file) as disk:
        DRIVER.remove_bitmap(disk, "a")
        assert list(directory(file.content)) == ["b"]
        DRIVER.remove_bitmap(disk, "b")
        header = Header.parse(bytes(file.content))
        assert header.bitmaps is None
        assert not header.autoclear_features
        with pytest.raises(ImageUnsupported, match="Dirty bitmap 'b' not found"):
            DRIVER.remove_bitmap(disk, "b")
        DRIVER.add_bitmap(disk, "b", None)
    assert verify(bytes(file.content)) == ([], [])
    assert list(directory(file.content)) == ["b"]


def test_somebody_wrote_who_knows_no_bitmaps() -> None:
    file = image("b")
    file.content[95] = 0
    disk = open_image(read_only(bytes(file.content)))
    assert disk.dirty_bitmaps == []
    (warning,) = disk.context.warnings  # type: ignore[attr-defined]
    assert "a program lacking bitmap support modified this file" in warning
    disk = open_image(file, node_options=WRITABLE)
    assert Header.parse(bytes(file.content)).bitmaps is None
    DRIVER.add_bitmap(disk, "b", 4096)
    disk.write(0, b"x")
    disk.close()
    assert ranges(file.content, "b") == [(0, 4096)]
    assert len(verify(bytes(file.content)).leaks) > 0


# -- what is refused -------------------------------------------------------------------------------


def inconsistent() -> MemoryFile:
    file = image("b", "good")
    disk = open_image(file, node_options=WRITABLE)
    DRIVER.enable_bitmap(disk, "good", False)
    DRIVER.store_bitmaps(disk)
    disk.write(0, b"x")
    disk.flush()
    return MemoryFile(file.content)


def test_inconsistent_bitmaps_can_only_be_removed() -> None:
    file = inconsistent()
    with opened(file) as disk:
        for action in (
            lambda: DRIVER.clear_bitmap(disk, "b"),
            lambda: DRIVER.enable_bitmap(disk, "b", True),
            lambda: DRIVER.merge_bitmap(disk, "b", disk, "good"),
            lambda: DRIVER.merge_bitmap(disk, "good", disk, "b"),
            lambda: disk.truncate(SIZE + 512),
            lambda: disk.truncate(SIZE - 512),
        ):
            with pytest.raises(ImageCorrupt, match="Bitmap 'b' is inconsistent and cannot be used"):
                action()
        # Work goes on, and leaves it as it is.
        disk.write(4096, b"x")
        DRIVER.enable_bitmap(disk, "good", True)
        disk.write(8192, b"x")
    assert flags(file.content) == {"b": IN_USE | AUTO, "good": AUTO}
    assert ranges(file.content, "good") == [(8192, 512)]
    with opened(file) as disk:
        DRIVER.remove_bitmap(disk, "b")
        disk.truncate(SIZE + 512)
    assert verify(bytes(file.content)).errors == []
    assert flags(file.content) == {"good": AUTO}


def test_bitmaps_that_cannot_be_made() -> None:
    file = image("b")
    with opened(file) as disk:
        for name, granularity, message in (
            ("b", None, "Bitmap already exists: b"),
            ("", None, "Bitmap name cannot be empty"),
            ("c", 1000, "Granularity must be power of 2 and at least 512"),
            ("c", 1 << 32, "Granularity must be power of 2 and at least 512"),
            ("x" * 1024, None, r"Can't make bitmap 'x+' persistent in '#.*': Name length exceeds"),
        ):
            with pytest.raises(LaminaError, match=message):
                DRIVER.add_bitmap(disk, name, granularity)
        DRIVER.add_bitmap(disk, "x" * 1023, 1 << 31)
    assert set(directory(file.content)) == {"b", "x" * 1023}
    with opened(MemoryFile(make(SIZE, compat="0.10"))) as disk:
        assert not DRIVER.keeps_bitmaps(disk)
        with pytest.raises(ImageUnsupported, match="Cannot store dirty bitmaps in qcow2 v2 files"):
            DRIVER.add_bitmap(disk, "b", None)
    with (
        opened(MemoryFile(make(1 << 42))) as disk,
        pytest.raises(ImageUnsupported, match="Too much space will be occupied by the bitmap"),
    ):
        DRIVER.add_bitmap(disk, "b", 512)


def test_what_is_only_read() -> None:
    file = image("b")
    disk = open_image(read_only(bytes(file.content)))
    for action in (DRIVER.clear_bitmap, DRIVER.remove_bitmap):
        with pytest.raises(Refused, match="Bitmap 'b' is readonly and cannot be modified"):
            action(disk, "b")
    with pytest.raises(Refused):
        DRIVER.add_bitmap(disk, "c", None)


def test_snapshots_are_not_applied_under_bitmaps() -> None:
    file = image("b")
    with opened(file) as disk:
        DRIVER.create_snapshot(disk, SnapshotInfo("", "s", 0, 0, 0, 0, 0))
        with pytest.raises(ImageUnsupported, match="Device has active dirty bitmaps"):
            DRIVER.apply_snapshot(disk, "s")
        DRIVER.remove_bitmap(disk, "b")
        DRIVER.apply_snapshot(disk, "s")
    assert verify(bytes(file.content)) == ([], [])


def test_a_bitmap_of_somebody_else() -> None:
    """Bitmaps that are not kept in the image live beside those that are."""
    file = image("b")
    with opened(file) as disk:
        from lamina.block.tracking import track

        mine = DirtyBitmap("mine", disk.size, 4096)
        track(disk, mine)
        disk.write(5000, b"x")
        DRIVER.merge_bitmap(disk, "b", disk, "mine")
        DRIVER.clear_bitmap(disk, "mine")
        assert not mine.dirty_bytes
    assert ranges(file.content, "b") == [(4096, 4096)]


# -- when storing fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", range(12))
def test_storage_gives_up_while_storing(allowed: int) -> None:
    file = image("a", "b")
    disk = open_image(file, node_options=WRITABLE)
    disk.write(0, b"x" * 5000)
    disk.flush()
    left = [allowed]

    def fail(kind: str, offset: int, length: int) -> None:
        if kind in ("write", "flush"):
            left[0] -= 1
            if left[0] < 0:
                raise StorageError("No space left on device", errno=28)

    file.hook = fail
    stored = True
    try:
        DRIVER.store_bitmaps(disk)
    except StorageError:
        stored = False
    content = bytes(file.content)
    assert verify(content).errors == []
    marks = flags(content)
    assert marks in ({"a": AUTO, "b": AUTO}, {"a": AUTO | IN_USE, "b": AUTO | IN_USE})
    if marks["a"] == AUTO:
        assert ranges(content, "a") == [(0, 5120)]
    # It can be tried again.
    file.hook = None
    if not stored:
        DRIVER.store_bitmaps(disk)
    assert ranges(file.content, "b") == [(0, 5120)]
    disk.close()
    assert verify(bytes(file.content)).errors == []
    assert flags(file.content) == {"a": AUTO, "b": AUTO}


def test_what_was_lost_is_reported() -> None:
    file = image("b")
    disk = open_image(file, node_options=WRITABLE)
    disk.write(0, b"x")
    disk.flush()

    def fail(kind: str, offset: int, length: int) -> None:
        if kind == "write":
            raise StorageError("No space left on device", errno=28)

    file.hook = fail
    disk.close()
    assert disk.context.warnings[0] == (  # type: ignore[attr-defined]
        f"error: Lost persistent bitmaps during inactivation of node '{disk.name}': "
        "Failed to write bitmap 'b' to file: No space left on device"
    )
    assert flags(file.content) == {"b": AUTO | IN_USE}


# -- damage ----------------------------------------------------------------------------------------


def repaired(content: bytearray, expected: str) -> bytes:
    """The image after ``check -r all``, and what it found."""
    with pytest.raises(ImageCorrupt):
        open_image(read_only(bytes(content)))
    file = MemoryFile(content)
    disk = open_image(file, node_options=WRITABLE, check=True)
    lines: list[str] = []
    result = DRIVER.check(disk, Fix(leaks=True, errors=True), lines.append)
    assert any(expected in line for line in lines), lines
    assert not result.corruptions
    assert result.corruptions_fixed
    # It can be used at once.
    DRIVER.add_bitmap(disk, "new", None)
    disk.write(0, b"x")
    disk.close()
    assert verify(bytes(file.content)) == ([], [])
    return bytes(file.content)


def damaged() -> tuple[bytearray, int, int, int]:
    """An image of three bitmaps; where extension, directory and the table of the first are."""
    file = image("a", "b", "c")
    with opened(file) as disk:
        disk.write(0, b"x")
    content = file.content
    extension = bytes(content).index(bytes.fromhex("2385287500000018")) + 8
    start = int.from_bytes(content[extension + 16 : extension + 24], "big")
    return content, extension, start, int.from_bytes(content[start : start + 8], "big")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, (5).to_bytes(8, "big"), "Bitmap 'c' doesn't satisfy the constraints"),
        (8, (0).to_bytes(4, "big"), "Bitmap 'c' doesn't satisfy the constraints"),
        (8, (2).to_bytes(4, "big"), "Could not read bitmap 'c' from image"),
        (12, (8).to_bytes(4, "big"), "Bitmap 'c' doesn't satisfy the constraints"),
        (17, b"\x05", "Bitmap 'c' doesn't satisfy the constraints"),
        (24, b"b", "Bitmap already exists: b"),
    ],
)
def test_a_damaged_entry_is_removed(offset: int, value: bytes, message: str) -> None:
    content, _, start, _ = damaged()
    content[start + offset : start + offset + len(value)] = value
    found = repaired(content, message)
    assert set(directory(found)) == {"a", "b", "new"}
    assert ranges(found, "a") == [(0, 512)]


@pytest.mark.parametrize("word", [2, 1 << 60, 513, 1 << 40 | 1])
def test_a_damaged_table_is_removed(word: int) -> None:
    content, _, _, table = damaged()
    content[table : table + 8] = word.to_bytes(8, "big")
    found = repaired(content, "bitmap 'c': table entry 0 is not valid")
    assert set(directory(found)) == {"a", "b", "new"}


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, (2).to_bytes(4, "big")), (8, (40).to_bytes(8, "big")), (16, (1 << 40).to_bytes(8, "big"))],
)
def test_a_damaged_directory_is_dropped(offset: int, value: bytes) -> None:
    content, extension, _, _ = damaged()
    content[extension + offset : extension + offset + len(value)] = value
    found = repaired(content, "Repairing")
    assert set(directory(found)) == {"new"}


def test_small_files_cannot_describe_large_bitmaps() -> None:
    """Tables that name one place again and again would cost time and memory."""
    file = image("b", size=512 << 20, cluster_size=4 * KIB)
    content = file.content
    entry = directory(content)["b"]
    place, end = entry.table_offset, entry.table_offset + entry.table_size * 8
    # What a table names need not be there...
    word = (1 << 40).to_bytes(8, "big")
    content[place : place + 8] = word
    assert ranges(content, "b") == []
    # ...but not all of this can be.
    content[place:end] = word * entry.table_size
    with pytest.raises(ImageCorrupt, match="name more clusters than the image file has"):
        open_image(read_only(bytes(content)))
    packed = pack_directory([BitmapEntry(name, 4 * KIB, 65536, 0, 9) for name in "abc"])
    header = Header(size=1 << 40, cluster_bits=12, autoclear_features=1)
    header.bitmaps = BitmapsExtension(3, len(packed), 4 * KIB)
    with pytest.raises(ImageCorrupt, match="Bitmap tables are larger than the image file"):
        read_bitmaps(MemoryFile(bytes(4 * KIB) + packed), header)
