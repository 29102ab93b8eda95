"""Storage that fails once, at every single request: the image stays whole, the disk goes on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.testing.memory import MemoryFile
from tests.crash.faults import Fault
from tests.unit.qcow2.images import make, open_image, verify

SIZE = 64 << 10
BELOW = random.Random(4).randbytes(SIZE)
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


class Guest:
    """Random requests; where one fails, its bytes may be old or new from then on."""

    def __init__(self, disk: Disk, seed: int, unit: int, *, zeroes: bool) -> None:
        """``zeroes``: what was discarded reads as zeroes."""
        self.disk = disk
        self.zeroes = zeroes
        self.rng = random.Random(seed)
        self.unit = unit
        self.content = bytearray(BELOW)
        self.unsure: set[int] = set()
        """Bytes that a failed request may have touched."""
        self.failures = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        rng, unit, disk = self.rng, self.unit, self.disk
        offset = rng.randrange(SIZE - 1)
        length = min(rng.choice([1, 100, unit, 5 * unit]), SIZE - offset)
        start = rng.randrange(SIZE // unit) * unit
        action = rng.randrange(9)
        data = rng.randbytes(length)
        if action < 4:
            self.change(offset, data, lambda: disk.write(offset, data))
        elif action == 4:
            self.change(offset, bytes(length), lambda: disk.write_zeroes(offset, length))
        elif action == 5:
            data = bytes([rng.randrange(1, 256)]) * unit
            self.change(
                start, data, lambda: disk.write_compressed([(start, memoryview(data))])
            )
        elif action == 6:
            # Version 2 cannot say that nothing is here, not even the backing file's content.
            after = bytes(unit) if self.zeroes else bytes(self.content[start : start + unit])
            self.change(start, after, lambda: disk.discard(start, unit))
        elif action == 7:
            buffer = bytearray(length)
            if self.attempt(lambda: disk.readv([(offset, memoryview(buffer))])):
                self.compare(offset, buffer)
        else:
            self.attempt(disk.flush)

    def attempt(self, action: Any) -> bool:
        try:
            action()
        except LaminaError:
            self.failures += 1
            return False
        return True

    def change(self, offset: int, data: bytes, action: Any) -> None:
        span = range(offset, offset + len(data))
        if self.attempt(action):
            self.content[offset : offset + len(data)] = data
            self.unsure.difference_update(span)
        else:
            self.unsure.update(span)

    def compare(self, offset: int, found: bytes | bytearray) -> None:
        for place, byte in enumerate(found, offset):
            if byte != self.content[place]:
                assert place in self.unsure, f"byte {place} is {byte}"


def play(options: dict[str, Any], seed: int, fault: Fault) -> tuple[MemoryFile, Guest]:
    unit = options["cluster_size"]
    file = MemoryFile(make(SIZE, backing_file="below", backing_fmt="raw", **options))
    below = MemoryFile(BELOW, NodeOptions(read_only=True))
    disk = open_image(file, backing=below, node_options=WRITABLE)
    file.hook = fault
    guest = Guest(disk, seed, unit, zeroes="compat" not in options)
    guest.run(30)
    return file, guest


CASES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 1024, "refcount_bits": 1},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 2048, "lazy_refcounts": True},
    {"cluster_size": 1024, "compat": "0.10"},
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_one_failure(number: int) -> None:
    """It is told, it does no harm, and everything after it works."""
    options = CASES[number]
    calm = Fault(0)
    play(options, number, calm)
    assert calm.seen > 50
    for at in range(1, calm.seen + 1):
        file, guest = play(options, number, Fault(at))
        file.hook = None
        guest.run(6)
        guest.compare(0, guest.disk.read(0, SIZE))
        guest.disk.close()
        verdict = verify(bytes(file.content))
        assert verdict.errors == [], f"request {at} failed"
        # Opened again, it reads the same.
        below = MemoryFile(BELOW, NodeOptions(read_only=True))
        again = open_image(MemoryFile(file.content), backing=below, node_options=WRITABLE)
        guest.compare(0, again.read(0, SIZE))


@pytest.mark.parametrize("number", range(len(CASES) - 2))
def test_storage_that_is_gone(number: int) -> None:
    """From some request on everything fails: nothing is worse than a leak."""
    options = CASES[number]
    calm = Fault(0)
    play(options, number, calm)
    for at in range(1, calm.seen + 1, 3):
        file, guest = play(options, number, Fault(at, for_ever=True))
        guest.disk.close()
        assert guest.failures
        assert verify(bytes(file.content)).errors == [], f"all fail from request {at}"
