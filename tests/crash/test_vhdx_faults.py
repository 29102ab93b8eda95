"""Storage that fails once, at every single request: the image stays whole, the disk goes on."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from lamina.block.driver import Fix
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.vhdx.check import check
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB
from tests.crash.faults import Fault
from tests.unit.vhdx.images import READ_ONLY, filled, make, open_image

SIZE = 2 * MIB + 64 * KIB
BELOW = random.Random(4).randbytes(SIZE)


class Guest:
    """Random requests; where one fails, its bytes may be old or new from then on."""

    def __init__(self, disk: Disk, seed: int, content: bytes) -> None:
        self.disk = disk
        self.rng = random.Random(seed)
        self.content = bytearray(content)
        self.sure = np.ones(SIZE, dtype=np.bool_)
        """Off for bytes that a failed request may have touched."""
        self.failures = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        rng, disk = self.rng, self.disk
        block = rng.randrange(3) * MIB
        offset = block + rng.randrange(32 * KIB)
        action = rng.randrange(8)
        if action < 4:
            data = rng.randbytes(rng.choice([1, 100, 5000]))
            self.change(offset, data, lambda: disk.write(offset, data))
        elif action < 6:
            length = min(MIB, SIZE - block)
            # Where a failure left the disk longer, the last block is not a whole one: a discard of
            # its part would be ignored.
            whole = block + length == disk.size or length == MIB
            clear = disk.discard if action == 4 and whole else disk.write_zeroes
            self.change(block, bytes(length), lambda: clear(block, length))
        elif action == 6:
            self.attempt(lambda: disk.truncate(SIZE + MIB))
            self.attempt(lambda: disk.truncate(SIZE))
        else:
            self.attempt(disk.flush)

    def attempt(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except LaminaError:
            self.failures += 1
            return False
        return True

    def change(self, offset: int, data: bytes, action: Callable[[], object]) -> None:
        span = slice(offset, offset + len(data))
        done = self.attempt(action)
        self.sure[span] = done
        if done:
            self.content[span] = data

    def compare(self, found: bytes) -> None:
        same = np.frombuffer(found, np.uint8) == np.frombuffer(self.content, np.uint8)
        assert (same | ~self.sure).all()


def play(kind: str, fault: Fault) -> tuple[MemoryFile, bytes | None, Guest]:
    parent = filled(make(SIZE), BELOW) if kind == "differencing" else None
    file = MemoryFile(make(SIZE, parent=parent))
    disk = open_image(file, parent=parent)
    file.hook = fault
    guest = Guest(disk, 7, BELOW if parent else bytes(SIZE))
    guest.run(20)
    return file, parent, guest


def verify(file: MemoryFile, parent: bytes | None, guest: Guest, *, exact: bool) -> None:
    """The image is whole, and with ``exact`` what was written is there."""
    options = NodeOptions(read_only=False, unmap=True, filename="memory")
    for node_options in (READ_ONLY, options):
        with open_image(file, parent=parent, node_options=node_options) as disk:
            lines: list[str] = []
            found = check(disk.mapping, Fix(), lines.append)
            assert found.corruptions == disk.mapping.image.replayed & disk.read_only, lines
            content = disk.read(0, SIZE)
            if exact:
                guest.compare(content)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_one_failure(kind: str) -> None:
    """It is told, it does no harm, and everything after it works."""
    calm = Fault(0)
    play(kind, calm)
    assert calm.seen > 50
    for at in range(1, calm.seen + 1, 2):
        file, parent, guest = play(kind, Fault(at))
        file.hook = None
        guest.run(4)
        assert guest.attempt(lambda disk=guest.disk: disk.truncate(SIZE))
        guest.compare(guest.disk.read(0, SIZE))
        guest.disk.flush()
        # As it would be found after a crash now, then as it is left.
        verify(MemoryFile(file.content), parent, guest, exact=True)
        guest.disk.close()
        verify(file, parent, guest, exact=True)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_storage_that_is_gone(kind: str) -> None:
    """From some request on everything fails: the image stays whole."""
    calm = Fault(0)
    play(kind, calm)
    for at in range(1, calm.seen + 1, 5):
        file, parent, guest = play(kind, Fault(at, for_ever=True))
        guest.disk.close()
        file.hook = None
        assert guest.failures
        disk = open_image(MemoryFile(file.content), parent=parent, node_options=READ_ONLY)
        size = disk.size
        disk.close()
        if size == SIZE:
            verify(file, parent, guest, exact=False)
