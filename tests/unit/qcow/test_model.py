"""qcow beside the model disk, and with the power cut at every write."""

from __future__ import annotations

import random

import pytest

from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.qcow.images import empty_image, open_image

SIZE = 256 << 10


class Images(ImageMaker):
    def make(self, size, backing):
        self.file = MemoryFile(empty_image(size, backing=backing is not None))
        self.backing = backing
        return open_image(self.file, backing)

    def reopen(self, node):
        node.close()
        content = self.file.content
        self.file = MemoryFile(content)
        return open_image(self.file, self.backing)


TestModel = model_test(Images, size=SIZE, unit=512, resizable=False, examples=20, steps=20)


def random_workload(seed: int):
    def workload(file: CrashFile, guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(file)
        for _ in range(25):
            offset = rng.randrange(0, SIZE, 512)
            length = min(rng.randrange(1, 5000), SIZE - offset)
            match rng.randrange(6):
                case 0:
                    guest.flush(disk)
                case 1:
                    guest.write_compressed(disk, offset, bytes([rng.randrange(256)]) * 512)
                case 2:
                    guest.write_zeroes(disk, offset, length)
                case _:
                    guest.write(disk, offset + rng.randrange(200), rng.randbytes(length)[:-200])
        guest.flush(disk)
        disk.close()

    return workload


@pytest.mark.parametrize("seed", range(4))
def test_power_cuts(seed):
    cuts = 0
    for cut in power_cuts(
        random_workload(seed), initial=empty_image(SIZE), guest_content=bytes(SIZE), seed=seed
    ):
        disk = open_image(MemoryFile(cut.content))
        cut.verify(disk.read(0, SIZE))
        disk.close()
        cuts += 1
    assert cuts > 50
