"""The model disk drives qcow2: every combination of features reads as a bytearray would, whatever
is done to the image, and stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from lamina.block.driver import Fix, find_bitmap
from lamina.block.info import SnapshotInfo
from lamina.block.node import Node, NodeOptions
from lamina.block.options import parse
from lamina.block.secrets import Secrets
from lamina.engine.disk import Disk
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.create import create
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.mapping import Qcow2Mapping
from lamina.formats.qcow2.options import AmendOptions, CreateOptions, Options
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.testing.model import DiskModel, ImageMaker

from .features import FEATURES, Choice, accepted, compresses, options_of
from .images import verify
from .recorded import Recorded

KIB = 1 << 10
EXAMPLES = 1000
STEPS = 14
CLUSTERS = 40
"""Of a disk, about."""
BACKING_LENGTHS = (0.5, 1.0, 1.5)
"""Of the backing file, in disks."""
SAMPLE = 40
"""One image in so many is shown to QEMU."""
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")
BESIDE = NodeOptions(read_only=False, unmap=True, filename="data")
CHOICES: dict[str, tuple[Any, ...]] = {
    **FEATURES,
    # Mistakes live at the edges of clusters and tables, of which small ones have more.
    "cluster_size": (512, 1 * KIB, 4 * KIB, 16 * KIB, 32 * KIB),
    "preallocation": ("off", "off", "metadata"),
    "snapshots": (0,),
    "bitmaps": (False,),
    # LUKS costs a tenth of a second per image, so most have none.
    "encrypt_format": (None, None, None, None, None, None, "aes", "aes", "luks"),
}
_new: dict[str, tuple[bytes, bytes]] = {}
"""Images that hold nothing yet, and their data files, by what they are made of."""


class Context(NodesContext):
    """For creating an image as well; its data file is ``data``."""

    data: MemoryFile

    def create_beside(self, filename: str, size: int, *, from_here: bool = False) -> Node:
        self.data.truncate(size)
        return self.data


class Images(ImageMaker):
    """One image in memory."""

    def __init__(self) -> None:
        self.file = MemoryFile()
        self.data = MemoryFile()
        """The external data file, if there is one."""
        self.backing: bytes | None = None
        self.choice: Choice = {}
        self.secrets = Secrets()
        self.secrets.add("key", b"secret")
        self.runtime: dict[str, str] = {}

    def choose(self, choice: Choice, runtime: dict[str, str]) -> None:
        self.choice = choice
        self.runtime = dict(runtime)
        if choice["encrypt_format"]:
            self.runtime["encrypt.key-secret"] = "key"

    def make(self, size: int, backing: bytes | None) -> Node:
        options = options_of(self.choice)
        if self.choice["encrypt_format"]:
            options |= {"encrypt_key_secret": "key", "encrypt_iter_time": 0}
        if backing is not None:
            options |= {"backing_file": "below", "backing_fmt": "raw"}
        name = str((size, options))
        if name not in _new:
            file, self.data = MemoryFile(), MemoryFile(options=BESIDE)
            context: Any = self._context(file)
            create(CreateOptions(size=size, **options), file, context)
            _new[name] = bytes(file.content), bytes(self.data.content)
        file, data = _new[name]
        self.file, self.data = MemoryFile(file, WRITABLE), MemoryFile(data, BESIDE)
        self.backing = backing
        return self.open()

    def _context(self, file: MemoryFile, *, read_only: bool = False) -> NodesContext:
        below = None
        if self.backing is not None:
            below = MemoryFile(self.backing, NodeOptions(read_only=True))
        node_options = file.options if read_only else WRITABLE
        children = {"data_file": self.data} if self.choice["data_file"] else {}
        context = Context(file, backing=below, node_options=node_options, **children)
        context.secrets, context.data = self.secrets, self.data
        return context

    def open(self) -> Disk:
        return self._open(self._context(self.file))

    def _open(self, context: NodesContext) -> Disk:
        parsed, unknown = parse(Options, self.runtime)
        assert not unknown
        disk = DRIVER.open(parsed, context)
        assert isinstance(disk, Disk)
        return disk

    def look(self, snapshot: str) -> bytes:
        """What a snapshot in the file holds."""
        copy = MemoryFile(bytes(self.file.content), NodeOptions(read_only=True))
        disk = self._open(self._context(copy, read_only=True))
        DRIVER.load_snapshot(disk, snapshot)
        return disk.read(0, disk.size)

    def reopen(self, node: Node) -> Node:
        node.close()
        self.verify()
        self.file = MemoryFile(self.file.content, WRITABLE)
        self.data = MemoryFile(self.data.content, BESIDE)
        return self.open()

    def check(self, node: Node, content: bytes) -> None:
        """Our check has nothing to say, columns say what extents say, and a raw data file holds
        the disk."""
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
        if self.choice["data_file"] == "raw" and not self.choice["encrypt_format"]:
            assert self.data.content[: node.size].ljust(node.size, b"\0") == content

    def verify(self) -> None:
        verdict = verify(bytes(self.file.content))
        assert verdict.errors == []
        assert verdict.leaks == []

    def finish(self, node: Node) -> None:
        node.close()
        self.verify()


class Qcow2Model(DiskModel):
    """What is done to disks, and what is done to images."""

    maker_type = Images
    disk_size = 0
    unit = 512
    alignment = 512
    resizable = True
    backed = True
    serial = 0

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, Recorded] = {}
        self.changes = 0

    @property
    def images(self) -> Images:
        assert isinstance(self.maker, Images)
        return self.maker

    @property
    def header(self) -> Header:
        assert isinstance(self.disk, Disk)
        mapping = self.disk.mapping
        assert isinstance(mapping, Qcow2Mapping)
        return mapping.header

    def create(self, choice: Choice, runtime: dict[str, str], backing: bytes | None) -> None:
        self.images.choose(choice, runtime)
        self.unit = choice["cluster_size"]
        self.disk_size = min(CLUSTERS * self.unit, 512 * KIB) + 1024
        self.node = self.maker.make(self.disk_size, backing)
        self.content = bytearray((backing or b"").ljust(self.disk_size, b"\0")[: self.disk_size])

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        choice = {name: data.draw(st.sampled_from(values)) for name, values in CHOICES.items()}
        # Of what excludes each other, the rarer gives way.
        for name in ("compat", "extended_l2", "data_file"):
            if not accepted(choice):
                choice[name] = CHOICES[name][0]
        if choice["backing"] and not choice["extended_l2"]:
            choice["preallocation"] = "off"
        if choice["encrypt_format"]:
            # What nobody has written reads as anything.
            choice["preallocation"] = "off"
            if choice["data_file"] == "raw":
                choice["data_file"] = "data"
        runtime = {}
        if choice["compat"] == "1.1":
            runtime["discard-no-unref"] = data.draw(st.sampled_from(["off", "off", "on"]))
            runtime["l2-cache-entry-size"] = data.draw(st.sampled_from(["512", "4096"]))
            if int(runtime["l2-cache-entry-size"]) > choice["cluster_size"]:
                del runtime["l2-cache-entry-size"]
        backing = None
        if choice["backing"]:
            size = min(CLUSTERS * choice["cluster_size"], 512 * KIB) + 1024
            length = int(size * data.draw(st.sampled_from(BACKING_LENGTHS))) // 512 * 512
            backing = bytes(255 - place % 251 for place in range(509)) * (length // 509 + 1)
            backing = backing[:length]
        self.create(choice, runtime, backing)

    # -- what needs wide counts --------------------------------------------------------------------

    @precondition(lambda self: self.node is not None and self.node.supports_compressed_writes)
    @rule(data=st.data())
    def write_compressed(self, data: Any) -> None:
        if compresses({**self.images.choice, "refcount_bits": self.header.refcount_bits}):
            super().write_compressed.__func__.hypothesis_stateful_rule.function(self, data)  # type: ignore[attr-defined]

    # -- snapshots -------------------------------------------------------------------------------

    def _may_take_snapshot(self) -> bool:
        """Counts are wide enough: for the snapshot, the disk, and one of them being applied."""
        if self.images.choice["data_file"]:
            return False
        return len(self.snapshots) < min((1 << self.header.refcount_bits) - 3, 3)

    @rule()
    def take_snapshot(self) -> None:
        if not self._may_take_snapshot():
            return
        self.changes += 1
        name = f"s{self.changes}"
        DRIVER.create_snapshot(self.disk, SnapshotInfo("", name, 0, 1, 0, 0, 0))
        self.snapshots[name] = bytes(self.content)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def apply_snapshot(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        if self.bitmaps:
            with pytest.raises(LaminaError, match="Device has active dirty bitmaps"):
                DRIVER.apply_snapshot(self.disk, name)
            return
        try:
            DRIVER.apply_snapshot(self.disk, name)
        except StorageError:
            # What all of them share is counted once more on the way; counts may be narrower by now.
            assert (1 << self.header.refcount_bits) - 1 < len(self.snapshots) + 2
            return
        self.content = bytearray(self.snapshots[name])

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def delete_snapshot(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        DRIVER.delete_snapshot(self.disk, name)
        del self.snapshots[name]

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def read_snapshot(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.disk.flush()
        if not self.header.incompatible_features & 1:
            assert self.images.look(name) == self.snapshots[name]

    # -- the whole -------------------------------------------------------------------------------

    def _may_resize(self) -> bool:
        return self.header.version > 2 or not self.snapshots

    @rule(data=st.data())
    def grow(self, data: Any) -> None:
        size = len(self.content) + 512 * data.draw(st.integers(0, 300))
        size = min(size, 2 * self.disk_size)
        if size > len(self.content) and self._may_resize():
            self.disk.truncate(size, zeroed=True)
            self.content.extend(bytes(size - len(self.content)))

    @rule(data=st.data())
    def shrink(self, data: Any) -> None:
        size = max(len(self.content) - 512 * data.draw(st.integers(1, 300)), 512)
        if size < len(self.content) and self._may_resize():
            self.disk.truncate(size)
            del self.content[size:]
            for recorded in self.bitmaps.values():
                recorded.cut(size)

    @rule(data=st.data())
    def amend(self, data: Any) -> None:
        """Anything; what is refused may come after the newer version, which is the first step."""
        header = self.header
        options: dict[str, Any] = {}
        for name, values in (
            ("compat", ("0.10", "1.1")),
            ("refcount_bits", FEATURES["refcount_bits"]),
            ("lazy_refcounts", (False, True)),
        ):
            if data.draw(st.booleans()):
                options[name] = data.draw(st.sampled_from(values))
        before = header.version, header.refcount_bits
        try:
            DRIVER.amend(self.disk, AmendOptions(**options), lambda part: None, force=False)
        except LaminaError:
            assert header.version >= before[0]
            assert header.refcount_bits == before[1] or "refcount_bits" in options
            return
        assert header.version == {None: before[0], "0.10": 2, "1.1": 3}[options.get("compat")]
        assert header.refcount_bits == options.get("refcount_bits", before[1])
        # A runtime option of the newer version only.
        if header.version < 3:
            self.images.runtime.pop("discard-no-unref", None)
            self.bitmaps.clear()

    @precondition(lambda self: self.images.backing is not None)
    @rule()
    def empty(self) -> None:
        """As after a commit to the backing file."""
        backing = self.images.backing
        assert backing is not None
        size = len(self.content)
        enabled = [recorded for recorded in self.bitmaps.values() if recorded.until is None]
        for recorded in enabled:
            recorded.stop(self.content)
        DRIVER.make_empty(self.disk)
        self.content = bytearray(backing.ljust(size, b"\0")[:size])
        # After a commit nothing looks different, so there is nothing to record.
        for recorded in enabled:
            recorded.go_on(self.content)

    # -- bitmaps: they have clusters of their own, and follow the length of the disk ---------------

    @rule(number=st.integers(0, 2))
    def add_bitmap(self, number: int) -> None:
        name = f"b{number}"
        with suppress(ImageUnsupported, UsageError):
            # There is one of that name already, or version 2 keeps none.
            DRIVER.add_bitmap(self.disk, name, None)
            self.bitmaps[name] = Recorded(self.content)

    def _some_bitmap(self, data: Any) -> str:
        return str(data.draw(st.sampled_from(sorted(self.bitmaps))))

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data())
    def remove_bitmap(self, data: Any) -> None:
        name = self._some_bitmap(data)
        DRIVER.remove_bitmap(self.disk, name)
        del self.bitmaps[name]

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data(), enabled=st.booleans())
    def enable_bitmap(self, data: Any, enabled: bool) -> None:
        name = self._some_bitmap(data)
        DRIVER.enable_bitmap(self.disk, name, enabled)
        if enabled:
            self.bitmaps[name].go_on(self.content)
        else:
            self.bitmaps[name].stop(self.content)

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data())
    def clear_bitmap(self, data: Any) -> None:
        name = self._some_bitmap(data)
        stopped = self.bitmaps[name].until is not None
        DRIVER.clear_bitmap(self.disk, name)
        self.bitmaps[name] = Recorded(self.content)
        if stopped:
            self.bitmaps[name].stop(self.content)

    @precondition(lambda self: len(self.bitmaps) > 1)
    @rule(data=st.data())
    def merge_bitmap(self, data: Any) -> None:
        source, target = self._some_bitmap(data), self._some_bitmap(data)
        DRIVER.merge_bitmap(self.disk, target, self.disk, source)
        for offset, length in find_bitmap(self.disk, source).ranges():
            assert any(
                start <= offset and offset + length <= start + run
                for start, run in find_bitmap(self.disk, target).ranges()
            )

    @invariant()
    def bitmaps_know_what_changed(self) -> None:
        for name, recorded in self.bitmaps.items():
            recorded.check(self.content, find_bitmap(self.disk, name).ranges())

    # -- the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        super().teardown()
        if self.node is None:
            return
        for name, content in self.snapshots.items():
            assert self.images.look(name) == content
        type(self).serial += 1
        if self.serial % SAMPLE == 0 and shutil.which("qemu-img"):
            show_to_qemu(self.images, bytes(self.content))


def show_to_qemu(images: Images, content: bytes) -> None:
    """Its check finds nothing, and it reads the same."""
    with TemporaryDirectory() as folder:
        image = Path(folder, "image")
        image.write_bytes(images.file.content)
        if images.choice["data_file"]:
            Path(folder, "data").write_bytes(images.data.content)
        if images.backing is not None:
            Path(folder, "below").write_bytes(images.backing)
        words = ["driver=qcow2,file.filename=image"]
        if "encrypt.key-secret" in images.runtime:
            words.append("encrypt.key-secret=key")
        named = ["--object", "secret,id=key,data=secret", "--image-opts", ",".join(words)]
        for command in (["check", *named], ["convert", *named, "-O", "raw", "raw"]):
            done = subprocess.run(
                ["qemu-img", *command], cwd=folder, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert Path(folder, "raw").read_bytes() == content


# In parts, so that they run side by side.
PARTS = 4


def part(number: int) -> Any:
    machine = type(f"Qcow2Model{number}", (Qcow2Model,), {})
    case = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=int(os.environ.get("LAMINA_MODEL_EXAMPLES", EXAMPLES)) // PARTS,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return pytest.mark.peer(case)


TestPart0, TestPart1, TestPart2, TestPart3 = (part(number) for number in range(PARTS))
