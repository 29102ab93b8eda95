"""The model disk beside the engine, on the sample format."""

from __future__ import annotations

from lamina.block.node import Node, NodeOptions
from lamina.testing import sample
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test

UNIT = 1024


class SampleImages(ImageMaker):
    def make(self, size: int, backing: bytes | None) -> Node:
        self.file = MemoryFile()
        self.below = backing
        sample.create(self.file, size, UNIT)
        return self._open()

    def _open(self) -> Node:
        below = None
        if self.below is not None:
            below = MemoryFile(self.below, NodeOptions(read_only=True))
        options = NodeOptions(read_only=False, unmap=True)
        return sample.open_disk(self.file, backing=below, options=options)

    def reopen(self, node: Node) -> Node:
        node.close()
        self.file = MemoryFile(self.file.content)
        return self._open()

    def check(self, node: Node, content: bytes) -> None:
        assert sample.check(MemoryFile(self.file.content)) == (0, [])
        again = self.reopen(node)
        assert again.read(0, again.size) == content


TestSampleModel = model_test(SampleImages, size=40 * UNIT + 300, unit=UNIT, examples=40, steps=40)
