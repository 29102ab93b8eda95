"""VHDX beside the model disk: dynamic, fixed and differencing, with both sizes of sectors."""

from __future__ import annotations

from lamina.block.driver import Fix
from lamina.formats.vhdx.check import check
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from lamina.units import MIB
from tests.unit.vhdx.images import READ_ONLY, filled, make, open_image

SIZE = 3 * MIB + 4096 * 6


class Images(ImageMaker):
    subformat = "dynamic"
    sector = 512

    def options(self):
        return {"subformat": self.subformat, "logical_sector_size": self.sector}

    def make(self, size, backing):
        self.parent = None
        options = self.options()
        if backing is not None:
            below = make(len(backing), logical_sector_size=self.sector)
            self.parent = filled(below, backing)
            options = {"logical_sector_size": self.sector}
        self.file = MemoryFile(make(size, parent=self.parent, **options))
        return open_image(self.file, parent=self.parent)

    def reopen(self, node):
        node.close()
        self.file = MemoryFile(self.file.content)
        return open_image(self.file, parent=self.parent)

    def check(self, node, content):
        lines = []
        result = check(node.mapping, Fix(), lines.append)
        assert (result.corruptions, lines) == (0, [])
        # Readers that come before the log is empty see the same.
        other = open_image(
            MemoryFile(self.file.content), parent=self.parent, node_options=READ_ONLY
        )
        assert other.read(0, other.size) == content
        other.close()


class LargeSectors(Images):
    sector = 4096


class FixedImages(Images):
    subformat = "fixed"


TestDynamic = model_test(
    Images, size=SIZE, unit=MIB, alignment=512, backed=False, examples=8, steps=20
)
TestFixed = model_test(
    FixedImages, size=SIZE, unit=MIB, alignment=512, backed=False, examples=5, steps=15
)
TestDifferencing = model_test(Images, size=SIZE, unit=MIB, alignment=512, examples=12, steps=20)
TestLargeSectors = model_test(
    LargeSectors, size=SIZE, unit=MIB, alignment=4096, examples=8, steps=20
)
