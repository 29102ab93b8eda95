"""The conformance suite on every protocol and filter that lives on a local file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from lamina.block.creation import create_image
from lamina.block.node import Node, NodeOptions
from lamina.block.opening import open_node
from lamina.block.session import Session
from lamina.protocols.nbd import connecting
from lamina.records import replace
from lamina.testing.conformance import SIZE, NodeConformance
from lamina.wire.nbd.agreement import Agreement, Style
from lamina.wire.nbd.negotiation_client import Wish, negotiate
from lamina.wire.nbd.steps import Negotiation
from tests.unit.nbd.serving import Serving


class OnFile(NodeConformance):
    """A graph on top of the file ``disk``."""

    options: ClassVar[dict[str, Any]]
    """``FILE`` stands for the name of the file."""
    direct: ClassVar[bool] = False
    grows_by_writing = True
    discards_to_zero = True

    def make(self, size: int) -> Node:
        with open(self.path / "disk", "wb") as file:
            file.truncate(size)
        return self.open()

    def open(self) -> Node:
        given = {
            key: str(self.path / "disk") if value == "FILE" else value
            for key, value in self.options.items()
        }
        defaults = NodeOptions(read_only=False, unmap=True, direct=self.direct)
        return open_node(given, session=Session(), defaults=defaults, protocol=True)

    def reopen(self, node: Node) -> Node:
        node.close()
        return self.open()


class TestFile(OnFile):
    options = {"driver": "file", "filename": "FILE"}


class TestDirectFile(OnFile):
    options = {"driver": "file", "filename": "FILE"}
    direct = True


class TestRaw(OnFile):
    options = {"driver": "raw", "file.driver": "file", "file.filename": "FILE"}


class TestRawFromOffset(OnFile):
    options = {"driver": "raw", "offset": 1536, "file.driver": "file", "file.filename": "FILE"}

    def make(self, size: int) -> Node:
        with open(self.path / "disk", "wb") as file:
            file.truncate(size + 1536)
        return self.open()


class TestRawWindow(OnFile):
    """It begins where no block begins."""

    options = {
        "driver": "raw",
        "offset": 1000,
        "size": SIZE,
        "file.driver": "file",
        "file.filename": "FILE",
    }
    grows_by_writing = False
    resizes = False
    discards_to_zero = False

    def make(self, size: int) -> Node:
        with open(self.path / "disk", "wb") as file:
            file.truncate(size + 4096)
        return self.open()


class TestRawWindowOfDirectFile(TestRawWindow):
    direct = True


class TestBlkdebug(OnFile):
    options = {"driver": "blkdebug", "image.driver": "file", "image.filename": "FILE"}


class TestBlkdebugWithLimits(OnFile):
    options = {
        "driver": "blkdebug",
        "image.driver": "file",
        "image.filename": "FILE",
        "align": "4k",
        "max-transfer": "64k",
        "opt-write-zero": "12k",
        "max-write-zero": "96k",
        "opt-discard": "12k",
        "max-discard": "36k",
    }


class TestBlkdebugOfDirectFile(TestBlkdebugWithLimits):
    direct = True


class TestCopyOnRead(OnFile):
    options = {"driver": "copy-on-read", "file.driver": "file", "file.filename": "FILE"}


class TestCopyOnReadOfOverlay(OnFile):
    """Whatever is read first is copied up from the backing file, which reads as zeroes."""

    options = {
        "driver": "copy-on-read",
        "file.driver": "qcow2",
        "file.file.driver": "file",
        "file.file.filename": "FILE",
    }
    grows_by_writing = False
    discards_to_zero = False

    def make(self, size: int) -> Node:
        base, overlay = str(self.path / "base"), str(self.path / "disk")
        create_image(base, "qcow2", session=Session(), size=size)
        create_image(
            overlay, "qcow2", session=Session(), backing_file=base, backing_format="qcow2"
        )
        return self.open()


class TestPreallocate(OnFile):
    options = {
        "driver": "preallocate",
        "prealloc-size": "1M",
        "file.driver": "file",
        "file.filename": "FILE",
    }


class TestPreallocateOfDirectFile(TestPreallocate):
    direct = True


class OnImage(OnFile):
    """An image of a format in the file ``disk``."""

    format: ClassVar[str]
    creation: ClassVar[dict[str, Any]] = {}
    grows_by_writing = False
    discards_to_zero = False

    def make(self, size: int) -> Node:
        name = str(self.path / "disk")
        create_image(name, self.format, session=Session(), options=self.creation, size=size)
        return self.open()

    def open(self) -> Node:
        given = {"driver": self.format, "file.filename": str(self.path / "disk")}
        defaults = NodeOptions(read_only=False, unmap=True)
        return open_node(given, session=Session(), defaults=defaults)


class TestParallels(OnImage):
    format = "parallels"
    creation = {"cluster_size": "4k"}
    discards_to_zero = True


class TestParallelsWithOddClusters(OnImage):
    format = "parallels"
    creation = {"cluster_size": "63k"}
    discards_to_zero = True
    discard_unit = 63 << 10


class TestQed(OnImage):
    format = "qed"
    creation = {"cluster_size": "4k", "table_size": "1"}
    shrinks = False


class TestQcow2Subclusters(OnImage):
    format = "qcow2"
    creation = {"extended_l2": "on", "cluster_size": "16k"}


class TestQcow2DataFile(OnImage):
    format = "qcow2"

    def make(self, size: int) -> Node:
        self.creation = {**self.creation, "data_file": str(self.path / "data")}
        return super().make(size)


class TestQcow2RawDataFile(TestQcow2DataFile):
    creation = {"extended_l2": "on", "data_file_raw": "on", "cluster_size": "16k"}


class TestVdi(OnImage):
    format = "vdi"


class TestStaticVdi(OnImage):
    format = "vdi"
    creation = {"static": "on"}


class TestVpc(OnImage):
    format = "vpc"
    creation = {"force_size": "on"}


class TestFixedVpc(OnImage):
    format = "vpc"
    creation = {"force_size": "on", "subformat": "fixed"}


class TestDifferencingVpc(OnImage):
    format = "vpc"

    def make(self, size: int) -> Node:
        base, name = str(self.path / "base"), str(self.path / "disk")
        create_image(base, "vpc", session=Session(), options={"force_size": "on"}, size=size)
        create_image(name, "vpc", session=Session(), backing_file="base", backing_format="vpc")
        return self.open()


class TestVhdx(OnImage):
    format = "vhdx"
    creation = {"block_size": "1M"}
    rounds = 100


class TestFixedVhdx(TestVhdx):
    creation = {"block_size": "1M", "subformat": "fixed"}


class TestDifferencingVhdx(TestVhdx):
    """Above a parent that reads as zeroes."""

    def make(self, size: int) -> Node:
        base = str(self.path / "base")
        create_image(base, "vhdx", session=Session(), size=size)
        given = {"backing_file": base, "backing_fmt": "vhdx", "block_size": "1M"}
        create_image(str(self.path / "disk"), "vhdx", session=Session(), options=given)
        return self.open()


class TestNbd(NodeConformance):
    """A raw file behind a server of ours."""

    resizes = False
    discards_to_zero = True
    style: ClassVar[Style] = Style.EXTENDED
    block: ClassVar[int] = 1

    @pytest.fixture(autouse=True)
    def _served(self, _own_directory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def no_higher(wish: Wish) -> Negotiation[Agreement]:
            return negotiate(replace(wish, highest=self.style))

        monkeypatch.setattr(connecting, "negotiate", no_higher)
        self._servers: list[Serving] = []
        yield
        for node in self._open:
            node.close()
        for one in self._servers:
            one.stop()

    def make(self, size: int) -> Node:
        path = self.path / str(len(self._servers))
        path.mkdir()
        one = Serving(path, size=size)
        one.start(block=self.block)
        self._servers.append(one)
        return self.open(one)

    def open(self, one: Serving) -> Node:
        defaults = NodeOptions(read_only=False, unmap=True)
        return open_node(one.options, session=Session(), defaults=defaults, protocol=True)

    def reopen(self, node: Node) -> Node:
        node.close()
        return self.open(self._servers[-1])


class TestNbdWithSimpleReplies(TestNbd):
    style = Style.SIMPLE


class TestNbdWithLargeBlocks(TestNbd):
    style = Style.STRUCTURED
    block = 4096


class TestVmdk(OnImage):
    format = "vmdk"
    discards_to_zero = True
    discard_unit = 65536


class TestVmdkWithZeroedGrains(TestVmdk):
    creation = {"zeroed_grain": "on"}


class TestFlatVmdk(OnImage):
    format = "vmdk"
    creation = {"subformat": "monolithicFlat"}


class TestSplitVmdk(TestVmdk):
    creation = {"subformat": "twoGbMaxExtentSparse"}


class TestVmdkOfTwoExtents(TestVmdk):
    """Cut in the middle, so that most requests meet the seam."""

    def make(self, size: int) -> Node:
        for name, length in (("one", size // 2), ("two", size - size // 2)):
            extent = str(self.path / name)
            create_image(extent, "vmdk", session=Session(), size=length)
        lines = [
            f'RW {length // 512} SPARSE "{name}"'
            for name, length in (("one", size // 2), ("two", size - size // 2))
        ]
        text = 'version=1\nCID=1\nparentCID=ffffffff\ncreateType="twoGbMaxExtentSparse"\n'
        (self.path / "disk").write_text(text + "\n".join(lines) + "\n")
        return self.open()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("losetup") is None,
    reason="needs root and losetup",
)
class TestDevice(NodeConformance):
    resizes = False
    discards_to_zero = True
    direct: ClassVar[bool] = False
    sector: ClassVar[int] = 512

    @pytest.fixture(autouse=True)
    def _devices(self, _own_directory: None) -> Iterator[None]:
        self._attached: list[str] = []
        yield
        for node in self._open:
            node.close()
        for device in self._attached:
            subprocess.run(["losetup", "--detach", device], check=True)

    def make(self, size: int) -> Node:
        image = self.path / "image"
        with open(image, "wb") as file:
            file.truncate(size)
        command = ["losetup", "--find", "--show", "--sector-size", str(self.sector), str(image)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(done.stderr)
        self.device = done.stdout.strip()
        self._attached.append(self.device)
        return self.open()

    def open(self) -> Node:
        defaults = NodeOptions(read_only=False, unmap=True, direct=self.direct)
        return open_node(self.device, session=Session(), defaults=defaults, protocol=True)

    def reopen(self, node: Node) -> Node:
        node.close()
        return self.open()


class TestDirectDevice(TestDevice):
    direct = True


class TestLargeSectors(TestDevice):
    direct = True
    sector = 4096
