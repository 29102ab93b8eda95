"""Parallels images beside the model disk: of both magics, with odd clusters, set aside or not."""

from __future__ import annotations

from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.parallels.images import empty_image, open_image, verify

SIZE = 100 << 10


class Images(ImageMaker):
    unit = 1024
    by_cluster = True
    prealloc = 0
    data_start: int | None = None

    def make(self, size, backing):
        image = empty_image(
            size, self.unit, by_cluster=self.by_cluster, data_start=self.data_start
        )
        self.file = MemoryFile(image)
        self.backing = backing
        return open_image(self.file, backing, prealloc=self.prealloc)

    def reopen(self, node):
        node.close()
        self.file = MemoryFile(self.file.content)
        self.sound(bytes(self.file.content))
        return open_image(self.file, self.backing, prealloc=self.prealloc)

    def check(self, node, content):
        """After the last flush, before the end: nothing but space set aside may be wrong."""
        result, lines, _ = verify(bytes(self.file.content))
        assert result.corruptions - ("ERROR image was not closed correctly" in lines) == 0

    def finish(self, node):
        node.close()
        self.sound(bytes(self.file.content))

    def sound(self, content):
        result, lines, _ = verify(content)
        assert (result.corruptions, result.leaks, lines) == (0, 0, [])


class Sectors(Images):
    unit = 1536
    by_cluster = False
    prealloc = 5000


class OldSectors(Images):
    """As the first programs made them: data follows the table, wherever that ends."""

    unit = 63 * 512
    by_cluster = False
    data_start = 0


TestClusters = model_test(
    Images, size=SIZE, unit=1024, resizable=False, examples=8, steps=15
)
TestSectors = model_test(
    Sectors, size=SIZE, unit=1536, resizable=False, examples=6, steps=15
)
TestOldSectors = model_test(
    OldSectors, size=SIZE, unit=63 * 512, resizable=False, examples=4, steps=15
)
# A disk consists of whole sectors.
TestGrowingClusters = model_test(Images, size=SIZE, unit=1024, alignment=512, examples=8, steps=20)
TestGrowingSectors = model_test(Sectors, size=SIZE, unit=1536, alignment=512, examples=8, steps=20)


def test_reopening():
    """The image is closed for those who look at it between two writers."""
    file = MemoryFile(empty_image(SIZE))
    disk = open_image(file, prealloc=10_000)
    for number in range(3):
        disk.write(number * 5000, bytes([number + 1]) * 3000)
        disk.reopen(read_only=True)
        result, lines, _ = verify(bytes(file.content))
        assert (result.corruptions, result.leaks, lines) == (0, 0, [])
        assert disk.read(number * 5000, 3000) == bytes([number + 1]) * 3000
        disk.reopen(read_only=False)
    disk.discard(0, 10_000)
    disk.write(90_000, b"x" * 5000)
    disk.close()
    assert verify(bytes(file.content))[1] == []
    assert open_image(file).read(90_000, 5000) == b"x" * 5000


def test_space_is_used_again_and_given_back():
    file = MemoryFile(empty_image(SIZE))
    disk = open_image(file)
    disk.write(0, b"a" * 50 * 1024)
    disk.flush()
    full = len(file.content)
    disk.discard(0, 20 * 1024)
    disk.flush()
    disk.write(60 * 1024, b"b" * 20 * 1024)
    disk.flush()
    assert len(file.content) == full
    disk.discard(40 * 1024, 10 * 1024)
    disk.close()
    assert len(file.content) == full - 10 * 1024
    assert verify(bytes(file.content))[1] == []
