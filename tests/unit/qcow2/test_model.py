"""The model disk drives qcow2: every combination reads as a bytearray would, and stays whole."""

from __future__ import annotations

from typing import Any, ClassVar

from lamina.block.node import Node, NodeOptions
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test

from .images import make, open_image, verify

KIB = 1 << 10
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


class Images(ImageMaker):
    options: ClassVar[dict[str, Any]] = {}
    runtime: ClassVar[dict[str, str]] = {}

    def make(self, size: int, backing: bytes | None) -> Node:
        options = dict(self.options)
        if backing is not None:
            options |= {"backing_file": "below", "backing_fmt": "raw"}
        self.file = MemoryFile(make(size, **options))
        self.backing = backing
        return self.open()

    def open(self) -> Node:
        below = None
        if self.backing is not None:
            below = MemoryFile(self.backing, NodeOptions(read_only=True))
        return open_image(self.file, backing=below, node_options=WRITABLE, **self.runtime)

    def reopen(self, node: Node) -> Node:
        node.close()
        self.verify()
        self.file = MemoryFile(self.file.content)
        return self.open()

    def verify(self) -> None:
        verdict = verify(bytes(self.file.content))
        assert verdict.errors == []
        assert verdict.leaks == []

    def finish(self, node: Node) -> None:
        node.close()
        self.verify()


class Small(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 512}


class Narrow(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 1 * KIB, "refcount_bits": 1}


class Wide(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 512, "refcount_bits": 64}
    runtime: ClassVar[dict[str, str]] = {"discard_no_unref": "on"}


class Old(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 4 * KIB, "compat": "0.10"}


class Lazy(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 4 * KIB, "lazy_refcounts": True}


class Zstd(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 64 * KIB, "compression_type": "zstd"}


TestSmall = model_test(
    Small, size=200 * KIB + 512, unit=512, alignment=512, examples=10, steps=20
)
TestNarrow = model_test(
    Narrow, size=100 * KIB, unit=1 * KIB, alignment=512, examples=10, steps=20
)
TestWide = model_test(Wide, size=100 * KIB, unit=512, resizable=False, examples=10, steps=20)
TestOld = model_test(Old, size=100 * KIB, unit=4 * KIB, resizable=False, examples=10, steps=20)
TestLazy = model_test(Lazy, size=100 * KIB, unit=4 * KIB, alignment=512, examples=8, steps=20)
TestZstd = model_test(Zstd, size=1000 * KIB, unit=64 * KIB, resizable=False, examples=5, steps=20)
