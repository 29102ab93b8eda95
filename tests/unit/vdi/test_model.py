"""VDI beside the model disk: every combination reads as a bytearray would, and stays whole."""

from __future__ import annotations

from typing import ClassVar

from lamina.block.node import Node
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.vdi.images import UNIT, WRITABLE, check, make, open_image


class Dynamic(ImageMaker):
    static: ClassVar[bool] = False

    def make(self, size: int, backing: bytes | None) -> Node:
        self.backing = None if backing is None else MemoryFile(backing)
        parent = b"" if backing is None else b"p" * 16
        image = make(size, static=self.static, parent=parent)
        self.file = MemoryFile(image, WRITABLE)
        return open_image(self.file, self.backing)

    def reopen(self, node: Node) -> Node:
        self.finish(node)
        self.file = MemoryFile(self.file.content, WRITABLE)
        return open_image(self.file, self.backing)

    def finish(self, node: Node) -> None:
        backing, self.backing = self.backing, None
        node.close()
        image = bytearray(self.file.content)
        image[0x1A8:0x1C8] = bytes(32)
        result, lines, _ = check(image)
        assert (result.corruptions, lines) == (0, [])
        self.backing = None if backing is None else MemoryFile(backing.content)


class Static(Dynamic):
    static = True


TestDynamic = model_test(
    Dynamic, size=(3 << 20) + 512, unit=UNIT, alignment=512, examples=8, steps=15
)
TestStatic = model_test(
    Static, size=2 << 20, unit=UNIT, alignment=512, backed=False, examples=4, steps=10
)
