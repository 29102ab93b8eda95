"""VHD beside the model disk: every combination reads as a bytearray would, and stays whole."""

from __future__ import annotations

from lamina.block.node import Node
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.vpc.images import ID, UNIT, WRITABLE, check, fixed, make, open_image


class Dynamic(ImageMaker):
    """A differencing image where there is a backing file."""

    def image(self, size: int) -> bytes:
        return make(size, parent=b"" if self.backing is None else ID)

    def make(self, size: int, backing: bytes | None) -> Node:
        self.backing = backing
        self.file = MemoryFile(self.image(size), WRITABLE)
        return self.open()

    def open(self) -> Node:
        return open_image(self.file, None if self.backing is None else MemoryFile(self.backing))

    def reopen(self, node: Node) -> Node:
        self.finish(node)
        self.file = MemoryFile(self.file.content, WRITABLE)
        return self.open()

    def finish(self, node: Node) -> None:
        node.close()
        result, lines, _ = check(bytes(self.file.content))
        assert (result.corruptions, result.leaks, lines) == (0, 0, [])


class Fixed(Dynamic):
    def image(self, size: int) -> bytes:
        return fixed(size)


TestDynamic = model_test(
    Dynamic, size=(100 << 10) + 512, unit=UNIT, alignment=512, examples=15, steps=20
)
TestFixed = model_test(
    Fixed, size=(100 << 10) + 512, unit=UNIT, alignment=512, backed=False, examples=8, steps=15
)
