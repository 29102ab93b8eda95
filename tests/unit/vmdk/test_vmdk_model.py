"""Every kind of VMDK that is written in place, beside the model disk."""

from __future__ import annotations

from lamina.block.driver import Fix
from lamina.block.node import NodeOptions
from lamina.block.permissions import Perm
from lamina.formats.vmdk import DRIVER
from lamina.formats.vmdk.descriptor import ExtentLine
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test
from tests.unit.vmdk.images import (
    GRAIN,
    WRITABLE,
    monolithic,
    open_image,
    sparse_extent,
    split,
)

SIZE = 40 * GRAIN
CID = 0x1234ABCD


class Images(ImageMaker):
    """``layout``: of the only extent."""

    layout: dict[str, object] = {}

    def make(self, size, backing):
        self.below = None
        if backing is not None:
            # A parent that is a VMDK, so that its identifier is looked at.
            line = ExtentLine("RW", len(backing), "FLAT", "below-flat")
            text = split("monolithicFlat", [line])
            options = NodeOptions(read_only=True, filename="below")
            data = MemoryFile(backing, options)
            self.below = open_image(MemoryFile(text, options), data, options=options)
            # It outlives the disks above it.
            self.below.used_by(None, "test", Perm.CONSISTENT_READ, Perm.ALL)
        self.files = [MemoryFile(content) for content in self.contents(size)]
        return self.open()

    @property
    def cid(self):
        return None if self.below is None else self.below.mapping.descriptor.cid

    def contents(self, size):
        return [monolithic(size, parent_cid=self.cid, **self.layout)]

    def open(self):
        return open_image(*self.files, backing=self.below, options=WRITABLE)

    def reopen(self, node):
        node.close()
        self.files = [MemoryFile(file.content) for file in self.files]
        return self.open()

    def check(self, node, content):
        lines = []
        result = DRIVER.check(node, Fix(), lines.append)
        # Storage in memory has no holes: what was punched out counts as lost.
        assert [line for line in lines if not line.startswith("Leaked ")] == []
        assert not result.corruptions
        assert not result.check_errors


class WithoutTables(Images):
    layout = {"tables": False}


class Zeroed(Images):
    layout = {"zeroed": True, "redundant": False}


class Split(Images):
    """Extents whose ends are ends of grains."""

    LENGTHS = (7 * GRAIN, GRAIN, 32 * GRAIN)

    def contents(self, size):
        lengths = self.LENGTHS
        lines = [ExtentLine("RW", length, "SPARSE", f"e{length}") for length in lengths]
        text = split("twoGbMaxExtentSparse", lines, self.cid)
        return [text, *(sparse_extent(length, zeroed=True) for length in lengths)]


class Uneven(Split):
    """Extents that begin anywhere, so that grains meet at no multiples."""

    LENGTHS = (5 * GRAIN + 512, 1024, SIZE - 5 * GRAIN - 1536)


class Mixed(Images):
    def contents(self, size):
        lines = [
            ExtentLine("RW", 8 * GRAIN, "FLAT", "one", 1024),
            ExtentLine("RW", 16 * GRAIN, "SPARSE", "two"),
            ExtentLine("RW", size - 24 * GRAIN, "FLAT", "one", 1024 + 8 * GRAIN),
        ]
        text = split("twoGbMaxExtentFlat", lines, self.cid)
        return [text, bytes(1024 + 8 * GRAIN), sparse_extent(16 * GRAIN), bytes(size)]


class Flat(Images):
    def contents(self, size):
        return [split("monolithicFlat", [ExtentLine("RW", size, "FLAT", "f")]), bytes(size)]


def _model(maker, *, resizable=False, backed=True):
    return model_test(
        maker, size=SIZE, unit=GRAIN, resizable=resizable, backed=backed, examples=12, steps=20
    )


TestSparse = _model(Images)
TestGrowing = model_test(
    Images, size=SIZE, unit=GRAIN, alignment=512, backed=False, examples=12, steps=20
)
TestWithoutTables = _model(WithoutTables)
TestZeroed = _model(Zeroed)
TestSplit = _model(Split)
TestUneven = _model(Uneven)
TestMixed = _model(Mixed, backed=False)
TestFlat = model_test(
    Flat, size=SIZE, unit=GRAIN, alignment=512, backed=False, examples=12, steps=20
)
