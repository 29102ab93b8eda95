"""QED beside the model disk: every combination reads as a bytearray would, and stays whole."""

from __future__ import annotations

from lamina.block.node import Node
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.qed.images import UNIT, check, make, open_image


class Images(ImageMaker):
    def make(self, size: int, backing: bytes | None) -> Node:
        options = {} if backing is None else {"backing_file": "below", "backing_fmt": "raw"}
        self.file = MemoryFile(make(size, **options))
        self.backing = backing
        return open_image(self.file, backing)

    def reopen(self, node: Node) -> Node:
        self.finish(node)
        self.file = MemoryFile(self.file.content)
        return open_image(self.file, self.backing)

    def finish(self, node: Node) -> None:
        node.close()
        result, _ = check(bytes(self.file.content))
        assert (result.corruptions, result.leaks) == (0, 0)


TestModel = model_test(
    Images, size=(600 << 10) + 512, unit=UNIT, alignment=512, examples=15, steps=20
)
