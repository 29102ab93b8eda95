"""Images that are broken in one way each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from lamina.block.driver import CheckResult, Fix
from lamina.block.node import NodeOptions
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.layout import COPIED, OFFSET_MASK, Header
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image

ALL = Fix(leaks=True, errors=True)
LEAKS = Fix(leaks=True)
NOTHING = Fix()

UNIT = 4096
SIZE = 64 * UNIT
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")
DATA = b"".join(bytes([value + 1]) * UNIT for value in range(4))
"""The first four clusters of the disk; the fifth one is compressed, the sixth a reserved zero."""
PACKED = b"packed" * (UNIT // 6) + b"\0" * (UNIT % 6)


class Image:
    """The bytes of an image, by the names of its parts."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.header = Header.parse(content)
        self.l1 = self.header.l1_table_offset
        self.table = self.header.refcount_table_offset

    def get(self, offset: int) -> int:
        return int(struct.unpack_from(">Q", self.content, offset)[0])

    def put(self, offset: int, value: int) -> None:
        struct.pack_into(">Q", self.content, offset, value)

    def change(self, offset: int, clear: int = 0, set: int = 0) -> None:
        self.put(offset, self.get(offset) & ~clear | set)

    @property
    def block(self) -> int:
        """Offset of the first refcount block."""
        return self.get(self.table) & OFFSET_MASK

    @property
    def l2(self) -> int:
        return self.get(self.l1) & OFFSET_MASK

    def entry(self, index: int) -> int:
        """Offset of an entry of the first L2 table."""
        return self.l2 + index * 8

    def place(self, index: int) -> int:
        """Host offset of a data cluster."""
        return self.get(self.entry(index)) & OFFSET_MASK

    def set_count(self, host_offset: int, value: int) -> None:
        """Only for counts of 16 bits."""
        block = self.get(self.table)
        struct.pack_into(">H", self.content, block + host_offset // UNIT * 2, value)

    def grow(self, clusters: int) -> int:
        """Append empty clusters; the offset of the first."""
        end = -(-len(self.content) // UNIT) * UNIT
        self.content.extend(bytes(end - len(self.content) + clusters * UNIT))
        return end


@cache
def sound(**options: Any) -> bytes:
    """An image with every kind of cluster in it."""
    version_2 = options.get("compat") == "0.10"
    file = MemoryFile(make(SIZE, cluster_size=UNIT, **options))
    disk = open_image(file, node_options=WRITABLE)
    disk.write(0, DATA)
    disk.write_compressed([(4 * UNIT, memoryview(PACKED))])
    if not version_2:
        disk.write(5 * UNIT, b"x" * UNIT)
        disk.write_zeroes(5 * UNIT, UNIT)
    disk.close()
    return bytes(file.content)


class Damage(NamedTuple):
    name: str
    inflict: Callable[[Image], object]
    lost: frozenset[int] = frozenset()
    """Clusters of the disk that cannot be brought back."""
    repairable: bool = True
    options: dict[str, Any] = {}


def _entry(index: int, **change: int) -> Callable[[Image], object]:
    return lambda image: image.change(image.entry(index), **change)


def _leak(image: Image) -> None:
    image.set_count(image.grow(3) + UNIT, 1)


def _l2_is_block(image: Image) -> None:
    image.put(image.l1, image.block | COPIED)

def _twice(image: Image) -> None:
    image.put(image.entry(1), image.get(image.entry(0)))


def _shared_table(image: Image) -> None:
    image.put(image.entry(1), image.l2 | COPIED)


def _block_beyond(image: Image) -> None:
    image.put(image.table, 1 << 40)


def _block_shared(image: Image) -> None:
    image.put(image.table + 8, image.l2)


def _table_on_l1(image: Image) -> None:
    struct.pack_into(">Q", image.content, 48, image.l1)


def _on_refcount_table(image: Image) -> None:
    image.put(image.entry(0), image.table | COPIED)


def _data_on(table: str) -> Callable[[Image], object]:
    return lambda image: image.put(image.entry(0), getattr(image, table) | COPIED)


def _l1_names_itself(image: Image) -> None:
    image.put(image.l1, image.l1 | COPIED)


def _cut_off(image: Image) -> None:
    del image.content[image.place(3) :]


def _features(bits: int) -> Callable[[Image], object]:
    return lambda image: image.change(72, set=bits)


EVERYTHING = frozenset(range(6))

DAMAGES = [
    Damage("leak", _leak),
    Damage("data too high", lambda i: i.set_count(i.place(0), 2)),
    Damage("data not counted", lambda i: i.set_count(i.place(0), 0)),
    Damage("L2 table not counted", lambda i: i.set_count(i.l2, 0)),
    Damage("header not counted", lambda i: i.set_count(0, 0)),
    Damage("refcount block not counted", lambda i: i.set_count(i.get(i.table), 0)),
    Damage("compressed too low", lambda i: i.set_count(i.place(4) & -UNIT, 0)),
    Damage("one place twice", _twice, frozenset({1})),
    Damage("data lies on the L2 table", _shared_table, frozenset({1})),
    Damage("COPIED missing", _entry(0, clear=COPIED)),
    Damage("COPIED missing in L1", lambda i: i.change(i.l1, clear=COPIED)),
    Damage("COPIED on compressed", _entry(4, set=COPIED)),
    Damage("data unaligned", _entry(0, set=0x200), frozenset({0})),
    Damage("zero unaligned", _entry(5, set=0x200)),
    Damage("data behind the end", _entry(0, set=1 << 40), frozenset({0})),
    Damage("data cut off", _cut_off, frozenset({3, 4, 5})),
    Damage("compressed behind the end", _entry(4, set=1 << 40), frozenset({4})),
    Damage("reserved bits", _entry(0, set=1 << 60 | 4)),
    Damage("reserved bits in L1", lambda i: i.change(i.l1, set=1 << 58 | 1)),
    Damage("L2 table unaligned", lambda i: i.change(i.l1, set=0x200), EVERYTHING),
    Damage("L2 table behind the end", lambda i: i.change(i.l1, set=1 << 40), EVERYTHING),
    Damage("L1 names itself", _l1_names_itself, EVERYTHING),
    Damage("no refcount table", lambda i: struct.pack_into(">I", i.content, 56, 0)),
    Damage("refcount table behind the end", lambda i: i.put(48, 1 << 40)),
    Damage("refcount table on the L1 table", _table_on_l1),
    Damage("refcount table in the header", lambda i: i.put(48, 0)),
    Damage("refcount block missing", lambda i: i.put(i.table, 0)),
    Damage("refcount block unaligned", lambda i: i.change(i.table, set=0x200)),
    Damage("refcount block reserved bits", lambda i: i.change(i.table, set=4)),
    Damage("refcount block behind the end", _block_beyond),
    Damage("refcount block twice", lambda i: i.put(i.table + 8, i.get(i.table))),
    Damage("refcount block on the L2 table", _block_shared),
    Damage("L2 table is the refcount block", _l2_is_block, EVERYTHING),
    Damage("data lies on the refcount table", _on_refcount_table, frozenset({0})),
    Damage("data lies on the L1 table", _data_on("l1"), frozenset({0})),
    Damage("data lies on the refcount block", _data_on("block"), frozenset({0})),
    Damage("refcount block on the L1 table", lambda i: i.put(i.table + 8, i.l1)),
    Damage("refcount table on the L2 table", lambda i: i.put(48, i.l2)),
    Damage("refcount table on its block", lambda i: i.put(48, i.block)),
    Damage("dirty", _features(1)),
    Damage("corrupt", _features(2)),
    Damage("L1 table behind the end", lambda i: i.put(40, 1 << 40), EVERYTHING, False),
    Damage("L1 table in the header", lambda i: i.put(40, 0), EVERYTHING, False),
    Damage(
        "zero flag in version 2", _entry(0, set=1), options={"compat": "0.10"}
    ),
    Damage(
        "data unaligned in version 2",
        _entry(0, set=0x200),
        frozenset({0}),
        options={"compat": "0.10"},
    ),
]


def damaged(damage: Damage) -> bytes:
    image = Image(sound(**damage.options))
    damage.inflict(image)
    return bytes(image.content)


def run_check(file: MemoryFile, fix: Fix) -> tuple[CheckResult, list[str]]:
    """Check what is in ``file``; the result and the lines for people."""
    lines: list[str] = []
    read_only = fix == NOTHING
    options = NodeOptions(read_only=read_only, filename="memory")
    disk = open_image(file, node_options=options, check=True)
    try:
        result = DRIVER.check(disk, fix, lines.append)
    finally:
        disk.close()
    return result, lines


def is_clean(result: CheckResult) -> bool:
    return not (result.corruptions or result.leaks or result.check_errors)
