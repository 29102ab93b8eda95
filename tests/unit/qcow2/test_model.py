"""The model disk drives qcow2: every combination reads as a bytearray would, and stays whole."""

from __future__ import annotations

from typing import Any, ClassVar

from lamina.block.driver import Fix
from lamina.block.node import Node, NodeOptions
from lamina.formats.qcow2 import DRIVER
from lamina.testing.memory import MemoryFile
from lamina.testing.model import ImageMaker, model_test

from .images import make, open_image, verify

KIB = 1 << 10
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


class Images(ImageMaker):
    options: ClassVar[dict[str, Any]] = {}
    data_file: ClassVar[bool] = False
    runtime: ClassVar[dict[str, str]] = {}

    def make(self, size: int, backing: bytes | None) -> Node:
        options = dict(self.options)
        if backing is not None:
            options |= {"backing_file": "below", "backing_fmt": "raw"}
        self.data = MemoryFile(options=WRITABLE) if self.data_file else None
        self.file = MemoryFile(make(size, data=self.data, **options))
        self.backing = backing
        return self.open()

    def open(self) -> Node:
        below = None
        if self.backing is not None:
            below = MemoryFile(self.backing, NodeOptions(read_only=True))
        return open_image(
            self.file, backing=below, data=self.data, node_options=WRITABLE, **self.runtime
        )

    def reopen(self, node: Node) -> Node:
        node.close()
        self.verify()
        self.file = MemoryFile(self.file.content)
        if self.data is not None:
            self.data = MemoryFile(self.data.content, WRITABLE)
        return self.open()

    def check(self, node: Node, content: bytes) -> None:
        lines: list[str] = []
        found = DRIVER.check(node, Fix(), lines.append)
        assert (found.corruptions, found.leaks) == (0, 0), lines
        rows = [
            (int(offset), int(length), int(kind), int(host))
            for piece in node.columns(0, node.size)
            for offset, length, kind, host in zip(
                piece.guest_offset, piece.length, piece.kind, piece.host_offset, strict=True
            )
        ]
        extents = [
            (one.guest_offset, one.length, int(one.kind), one.host_offset)
            for one in node.extents(0, node.size)
        ]
        assert rows == extents
        if self.options.get("data_file_raw"):
            assert self.data is not None
            assert self.data.content[: node.size].ljust(node.size, b"\0") == content

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


class Subclusters(Images):
    options: ClassVar[dict[str, Any]] = {"cluster_size": 16 * KIB, "extended_l2": True}


class KeptSubclusters(Images):
    """Preallocated, and nothing is given back."""

    options: ClassVar[dict[str, Any]] = {
        "cluster_size": 32 * KIB,
        "extended_l2": True,
        "preallocation": "metadata",
        "compression_type": "zstd",
    }
    runtime: ClassVar[dict[str, str]] = {"discard_no_unref": "on", "l2_cache_entry_size": "512"}


class Beside(Images):
    data_file = True
    options: ClassVar[dict[str, Any]] = {"cluster_size": 1 * KIB}


class BesideSubclusters(Images):
    data_file = True
    options: ClassVar[dict[str, Any]] = {"cluster_size": 16 * KIB, "extended_l2": True}


class Raw(Images):
    data_file = True
    options: ClassVar[dict[str, Any]] = {"cluster_size": 4 * KIB, "data_file_raw": True}


class RawSubclusters(Images):
    data_file = True
    options: ClassVar[dict[str, Any]] = {
        "cluster_size": 16 * KIB,
        "extended_l2": True,
        "data_file_raw": True,
    }


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
TestSubclusters = model_test(
    Subclusters, size=200 * KIB + 512, unit=16 * KIB, alignment=512, examples=12, steps=20
)
TestKeptSubclusters = model_test(
    KeptSubclusters, size=300 * KIB, unit=32 * KIB, alignment=512, examples=8, steps=20
)
TestBeside = model_test(
    Beside, size=50 * KIB + 512, unit=1 * KIB, alignment=512, examples=8, steps=20
)
TestBesideSubclusters = model_test(
    BesideSubclusters, size=200 * KIB, unit=16 * KIB, alignment=512, examples=8, steps=20
)
TestRaw = model_test(
    Raw, size=100 * KIB, unit=4 * KIB, alignment=512, backed=False, examples=8, steps=20
)
TestRawSubclusters = model_test(
    RawSubclusters,
    size=200 * KIB,
    unit=16 * KIB,
    alignment=512,
    backed=False,
    examples=8,
    steps=20,
)
