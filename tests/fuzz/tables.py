"""Fuzzing whole images of the formats whose tables are simple: qed, vdi, vpc."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from typing import NamedTuple

from lamina.block.driver import Driver, Fix
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.qed import DRIVER as QED
from lamina.formats.vdi import DRIVER as VDI
from lamina.formats.vpc import DRIVER as VPC
from lamina.testing.memory import MemoryFile
from tests.fuzz.mutation import mutate
from tests.unit.qed import images as qed
from tests.unit.vdi import images as vdi
from tests.unit.vpc import images as vpc

ALL = Fix(leaks=True, errors=True)
READ = 1 << 16
"""Guest bytes that are looked at."""
LONGEST = 1 << 26
"""Bytes: nothing that is done to a tiny image makes it grow beyond."""


class LimitedFile(MemoryFile):
    """Storage that is full soon: what a damaged number asks for does not fit in memory."""

    def _before(self, kind: str, offset: int, length: int) -> None:
        super()._before(kind, offset, length)
        if kind in ("write", "zero", "truncate") and offset + length > LONGEST:
            raise LaminaError("No space left on device", errno=28)


class Seed(NamedTuple):
    driver: Driver
    content: bytes
    spans: list[tuple[int, int]]
    """Where headers and tables are."""
    open: Callable[..., Disk]
    unit: int


def _written(image: bytes, open_image: Callable[..., Disk], unit: int) -> bytes:
    file = MemoryFile(image)
    disk = open_image(file, None)
    for block in (3, 0, 7):
        disk.write(block * unit, b"guest" * 400)
    disk.close()
    return bytes(file.content)


def seeds() -> dict[str, Seed]:
    """A tiny image of each kind, with a few blocks in it."""
    found = {}
    image = _written(qed.make(1 << 20), qed.open_image, qed.UNIT)
    table = struct.unpack_from("<Q", image, struct.unpack_from("<Q", image, 40)[0])[0]
    spans = [(0, 64), (qed.UNIT, qed.UNIT + 16), (table, table + 80)]
    found["qed"] = Seed(QED, image, spans, qed.open_image, qed.UNIT)
    image = _written(vdi.make(8 << 20), vdi.open_image, vdi.UNIT)
    found["vdi"] = Seed(VDI, image, [(0x40, 0x1D0), (0x200, 0x220)], vdi.open_image, vdi.UNIT)
    for name, image in (
        ("vpc", vpc.make(1 << 20)),
        ("vpc-child", vpc.make(1 << 20, parent=vpc.ID)),
        ("vpc-fixed", vpc.fixed(1 << 16)),
    ):
        image = _written(image, vpc.open_image, vpc.UNIT)
        spans = [(0, 90), (512, 700), (1024, 1200), (0x600, 0x640), (0x800, 0x840)]
        spans.append((len(image) - 512, len(image) - 420))
        found[name] = Seed(VPC, image, spans, vpc.open_image, vpc.UNIT)
    return found


def fuzz_tables(kind: Seed, count: int, seed: int = 0) -> dict[str, int]:
    """Put ``count`` mutated images through everything; how many came how far.

    Raises whatever is not one of our errors.
    """
    rng = random.Random(seed)
    reached = {"opened": 0, "checked": 0, "repaired": 0, "clean": 0}
    for _ in range(count):
        image = mutate(rng, kind.content, kind.spans)
        if rng.random() < 0.7 and kind.driver is VPC:
            _resum(image)
        _read(kind, bytes(image), reached)
        _repair(kind, bytes(image), reached, rng)
    return reached


def _resum(image: bytearray) -> None:
    """Damage behind a checksum is only seen if the checksum is right."""
    if len(image) > 1024:
        for start in (0, len(image) - 512):
            if image[start : start + 8] == b"conectix":
                vpc.resum(image, start, 512, 64)


def _read(kind: Seed, image: bytes, reached: dict[str, int]) -> None:
    file = MemoryFile(image)
    file.read_only = True
    try:
        disk = kind.open(file, None)
    except LaminaError:
        return
    reached["opened"] += 1
    size = min(disk.size, READ)
    for action in (
        lambda: disk.extents(0, size),
        lambda: list(disk.columns(0, size)),
        lambda: disk.read(0, size),
        lambda: disk.read(max(min(disk.size, 7 * kind.unit) - 10, 0), min(disk.size, 10)),
        disk.info,
        disk.close,
    ):
        _tolerates(action)
    assert file.content == image


def _repair(kind: Seed, image: bytes, reached: dict[str, int], rng: random.Random) -> None:
    file = LimitedFile(image)
    try:
        disk = kind.open(file, None, check=True)
    except LaminaError:
        return
    try:
        kind.driver.check(disk, Fix(), _ignore)
        assert file.content == image
        reached["checked"] += 1
        kind.driver.check(disk, ALL, _ignore)
        reached["repaired"] += 1
        again = kind.driver.check(disk, Fix(), _ignore)
        assert (again.corruptions, again.check_errors) == (0, 0)
        # It is sound now: it takes writes, and stays sound.
        size = min(disk.size, READ)
        if size > 4096:
            disk.write(rng.randrange(size - 2000), b"after" * 300)
        disk.close()
        disk = kind.open(LimitedFile(file.content), None, check=True)
        again = kind.driver.check(disk, Fix(), _ignore)
        assert (again.corruptions, again.check_errors) == (0, 0)
        reached["clean"] += 1
    except LaminaError:
        return
    finally:
        _tolerates(disk.close)


def _ignore(line: str) -> None:
    pass


def _tolerates(action: Callable[[], object]) -> None:
    with contextlib.suppress(LaminaError):
        action()
