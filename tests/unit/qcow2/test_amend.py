"""Amended images hold what they held: the disk, its snapshots, and every refcount."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.block.options import parse
from lamina.block.secrets import Secrets
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.create import create
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.mapping import Qcow2Mapping
from lamina.formats.qcow2.options import AmendOptions, CreateOptions, Options
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

from .images import verify

KIB = 1 << 10
SIZE = 96 * KIB
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


class Image:
    """An image in memory, its backing file, and what its disk and snapshots must hold."""

    def __init__(self, *, backing: bytes | None = None, size: int = SIZE, **options: Any) -> None:
        self.backing = backing
        self.format = options.get("encrypt_format")
        self.secrets = Secrets()
        self.secrets.add("key", b"passphrase")
        self.secrets.add("new", b"another one")
        self.key = "key"
        self.file = MemoryFile()
        if backing is not None:
            options |= {"backing_file": "below", "backing_fmt": "raw"}
        if self.format:
            options |= {"encrypt_key_secret": "key", "encrypt_iter_time": 1}
        context = self._context(self.file)
        create(CreateOptions(size=size, **options), self.file, context)  # type: ignore[arg-type]
        self.content = bytearray((backing or b"").ljust(size, b"\0")[:size])
        self.snapshots: dict[str, bytes] = {}

    def _context(self, file: MemoryFile, *, read_only: bool = False) -> NodesContext:
        below = None
        if self.backing is not None:
            below = MemoryFile(self.backing, NodeOptions(read_only=True))
        options = file.options if read_only else WRITABLE
        context = NodesContext(file, backing=below, node_options=options)
        context.secrets = self.secrets
        return context

    def open(self) -> Disk:
        return self._open(self._context(self.file))

    def look(self) -> Disk:
        """Open a copy of the file, to be read."""
        copy = MemoryFile(bytes(self.file.content), NodeOptions(read_only=True, filename="copy"))
        return self._open(self._context(copy, read_only=True))

    def _open(self, context: NodesContext) -> Disk:
        given = {"encrypt.key-secret": self.key} if self.format else {}
        disk = DRIVER.open(parse(Options, given)[0], context)
        assert isinstance(disk, Disk)
        return disk

    def scribble(self, disk: Disk, rng: random.Random, operations: int) -> None:
        """Writes of every kind; compressed clusters only where counts are wide enough for many of
        them in one host cluster."""
        unit = disk.mapping.unit
        packs = disk.supports_compressed_writes and header_of(disk).refcount_bits > 4
        for _ in range(operations):
            start = rng.randrange(len(self.content) // unit) * unit
            length = min(rng.choice([1, 2, 5]) * unit, len(self.content) - start)
            part = slice(start, start + length)
            kind = rng.choice(["write", "write", "zero", "unmap", "packed", "discard"])
            if kind == "write":
                data = rng.randbytes(length)
                disk.write(start, data)
                self.content[part] = data
            elif kind == "packed" and packs:
                data = bytes([rng.randrange(256)]) * length
                disk.write_compressed([(start, memoryview(data))])
                self.content[part] = data
            elif kind == "discard":
                disk.discard(start, length)
                self.content[part] = disk.read(start, length)
            else:
                flags = WriteFlags.MAY_UNMAP if kind == "unmap" else WriteFlags.NONE
                disk.write_zeroes(start, length, flags)
                self.content[part] = bytes(length)

    def take_snapshot(self, disk: Disk, name: str) -> None:
        DRIVER.create_snapshot(disk, SnapshotInfo("", name, 0, 1, 0, 0, 0))
        self.snapshots[name] = bytes(self.content)

    def check(self) -> Header:
        """Reopen and compare everything."""
        verdict = verify(bytes(self.file.content))
        assert verdict == ([], [])
        disk = self.look()
        assert disk.size == len(self.content)
        assert disk.read(0, disk.size) == self.content
        assert {one.name for one in disk.info().snapshots} == set(self.snapshots)
        for name, content in self.snapshots.items():
            other = self.look()
            DRIVER.load_snapshot(other, name)
            assert other.read(0, other.size) == content, name
        return header_of(disk)


def header_of(disk: Disk) -> Header:
    mapping = disk.mapping
    assert isinstance(mapping, Qcow2Mapping)
    return mapping.header


def amend(disk: Disk, force: bool = False, **options: Any) -> list[float]:
    shown: list[float] = []
    DRIVER.amend(disk, AmendOptions(**options), shown.append, force=force)
    return shown


BELOW = b"below" * 10000
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "backed": {"backing": BELOW * 3},
    "luks": {"encrypt_format": "luks"},
    "luks backed": {"encrypt_format": "luks", "backing": BELOW},
    "aes backed": {"encrypt_format": "aes", "backing": BELOW},
    "lazy": {"lazy_refcounts": True},
    "zstd": {"compression_type": "zstd"},
    "larger": {"cluster_size": 4 * KIB, "backing": BELOW},
}


def filled(
    kind: str | dict[str, Any], seed: int, snapshots: int
) -> tuple[Image, Disk, random.Random]:
    rng = random.Random(seed)
    options = KINDS[kind] if isinstance(kind, str) else kind
    image = Image(**{"cluster_size": 512, **options})
    disk = image.open()
    for number in range(snapshots):
        image.scribble(disk, rng, 12)
        image.take_snapshot(disk, f"s{number}")
        if number % 2:
            # A second snapshot of the same tables.
            image.take_snapshot(disk, f"t{number}")
    image.scribble(disk, rng, 12)
    return image, disk, rng


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snapshots", [0, 2])
def test_down_and_up_again(kind: str, snapshots: int) -> None:
    image, disk, rng = filled(kind, 1, snapshots)
    if kind == "zstd":
        with pytest.raises(LaminaError, match="zstd compression type and existing compressed"):
            amend(disk, compat="0.10")
        disk.close()
        assert image.check().version == 3
        return
    shown = amend(disk, compat="0.10")
    assert shown == sorted(shown)
    assert shown[-1] == 1.0
    image.scribble(disk, rng, 8)
    disk.close()
    header = image.check()
    assert header.version == 2
    assert not header.incompatible_features | header.compatible_features
    disk = image.open()
    amend(disk, compat="v3")
    image.scribble(disk, rng, 8)
    disk.close()
    assert image.check().version == 3


@pytest.mark.parametrize("kind", ["plain", "backed", "luks", "lazy", "zstd"])
@pytest.mark.parametrize("first", [8, 16, 32, 64])
def test_every_width_with_snapshots(kind: str, first: int) -> None:
    image, disk, rng = filled({**KINDS[kind], "refcount_bits": first}, first, 3)
    for bits in [32, 8, 64, 16, 8]:
        amend(disk, refcount_bits=bits)
        image.scribble(disk, rng, 4)
    disk.close()
    assert image.check().refcount_bits == 8


@pytest.mark.parametrize("kind", ["plain", "backed", "luks", "lazy"])
def test_narrow_widths(kind: str) -> None:
    image, disk, rng = filled({**KINDS[kind], "refcount_bits": 1}, 5, 0)
    for bits, snapshots in [(64, 0), (2, 2), (4, 11), (1, 0)]:
        for name in list(image.snapshots):
            DRIVER.delete_snapshot(disk, name)
            del image.snapshots[name]
        amend(disk, refcount_bits=bits)
        for number in range(snapshots):
            image.take_snapshot(disk, f"s{number}")
            image.scribble(disk, rng, number % 2)
        disk.close()
        assert image.check().refcount_bits == bits
        disk = image.open()
    with pytest.raises(LaminaError):
        image.take_snapshot(disk, "one too many")
    disk.close()


def test_a_width_that_is_too_small_changes_nothing() -> None:
    image, disk, _ = filled("plain", 3, 3)
    disk.flush()
    before = bytes(image.file.content)
    with pytest.raises(
        LaminaError,
        match=r"Cannot decrease refcount entry width to 2 bits: Cluster at offset 0x[0-9a-f]+ has "
        r"a refcount of [4-9]",
    ):
        amend(disk, refcount_bits=2)
    assert bytes(image.file.content) == before
    disk.close()
    assert image.check().refcount_bits == 16


def test_a_downgrade_keeps_reserved_places_and_frees_those_of_others() -> None:
    image = Image(cluster_size=4 * KIB, backing=b"x" * SIZE)
    disk = image.open()
    image.scribble(disk, random.Random(2), 0)
    disk.write(0, b"old" * 8 * KIB)
    image.content[: 24 * KIB] = b"old" * 8 * KIB
    image.take_snapshot(disk, "data")
    # The place is the snapshot's too: its data must survive.
    disk.write_zeroes(0, 8 * KIB)
    image.content[: 8 * KIB] = bytes(8 * KIB)
    disk.write(64 * KIB, b"y" * 4 * KIB)
    disk.write_zeroes(64 * KIB, 4 * KIB)
    image.content[64 * KIB : 68 * KIB] = bytes(4 * KIB)
    place = disk.extents(64 * KIB, 4 * KIB)[0].host_offset
    amend(disk, compat="0.10")
    assert disk.extents(64 * KIB, 4 * KIB)[0].host_offset == place
    disk.close()
    image.check()


def refusals() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    newer = "1.1 or above (use compat=1.1 or greater)"
    old = {"compat": "0.10"}
    yield {}, {"compat": "0.9"}, "Unknown compatibility level 0.9"
    for bits in (0, 3, 128):
        message = "Refcount width must be a power of two and may not exceed 64 bits"
        yield {}, {"refcount_bits": bits}, message
    yield {"refcount_bits": 8}, old, "compat=0.10 requires refcount_bits=16"
    yield old, {"refcount_bits": 8}, (
        f"Refcount widths other than 16 bits require compatibility level {newer}"
    )
    lazy = "Lazy refcounts only supported with compatibility level 1.1 and above "
    yield old, {"lazy_refcounts": True}, lazy + "(use compat=1.1 or greater)"
    yield {}, {"lazy_refcounts": True, **old}, lazy + "(use compat=1.1 or greater)"
    yield {}, {"backing_file": "x"}, "Cannot amend the backing file"
    yield {}, {"backing_fmt": "raw"}, "Cannot amend the backing file"
    yield {}, {"data_file": "x"}, (
        "data-file can only be set for images that use an external data file"
    )
    yield {}, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"
    yield {}, {"size": 1000}, "The new size must be a multiple of 512"
    yield {}, {"encrypt_state": "active"}, (
        "Can't amend encryption options - encryption not present"
    )
    aes = {"encrypt_format": "aes"}
    yield aes, {"encrypt_state": "active"}, "Only LUKS encryption options can be amended"
    luks = {"encrypt_format": "luks"}
    yield luks, {"encrypt_keyslot": 1}, "Parameter 'state' is missing"
    yield luks, {"encrypt_state": "on"}, "Parameter 'state' does not accept value 'on'"
    yield luks, {"encrypt_state": "inactive", "encrypt_keyslot": 0}, (
        "Attempt to erase the only active keyslot 0 which will erase all the data in the image "
        "irreversibly - refusing operation"
    )


@pytest.mark.parametrize(("made", "options", "message"), list(refusals()), ids=str)
def test_refusals_change_nothing(
    made: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    image = Image(cluster_size=512, **made)
    disk = image.open()
    before = bytes(image.file.content)
    with pytest.raises(LaminaError) as refused:
        amend(disk, **options)
    assert str(refused.value) == message
    assert bytes(image.file.content) == before
    disk.close()


def test_backing_files_may_be_named_as_they_are() -> None:
    image = Image(backing=b"below" * 1000)
    disk = image.open()
    amend(disk, backing_file="below", backing_fmt="raw", size=0)
    disk.close()
    image.check()


def test_sizes() -> None:
    image, disk, rng = filled({"backing": b"z" * 200 * KIB}, 9, 1)
    amend(disk, size=128 * KIB)
    image.content.extend(bytes(32 * KIB))
    image.scribble(disk, rng, 5)
    amend(disk, size=64 * KIB)
    del image.content[64 * KIB :]
    with pytest.raises(LaminaError, match="Internal snapshots prevent downgrade of image"):
        amend(disk, compat="0.10")
    amend(disk, size=SIZE, compat="0.10")
    image.content.extend(bytes(32 * KIB))
    with pytest.raises(LaminaError, match="Can't resize a v2 image which has snapshots"):
        amend(disk, size=128 * KIB)
    amend(disk, size=128 * KIB, compat="1.1", refcount_bits=32)
    image.content.extend(bytes(32 * KIB))
    disk.close()
    header = image.check()
    assert (header.version, header.refcount_bits) == (3, 32)


def test_lazy_refcounts() -> None:
    image, disk, rng = filled("plain", 4, 1)
    amend(disk, lazy_refcounts=True)
    image.scribble(disk, rng, 4)
    assert disk.mapping.metadata.lazy_counts
    amend(disk, lazy_refcounts=False)
    assert not disk.mapping.metadata.lazy_counts
    image.scribble(disk, rng, 4)
    disk.close()
    header = image.check()
    assert not header.compatible_features
    assert not header.incompatible_features


def test_an_image_in_lazy_use_is_amended_whole() -> None:
    image, disk, rng = filled("lazy", 6, 1)
    assert disk.mapping.metadata.lazy_counts
    amend(disk, refcount_bits=64)
    image.scribble(disk, rng, 4)
    amend(disk, refcount_bits=16, compat="0.10")
    image.scribble(disk, rng, 4)
    disk.close()
    assert image.check().version == 2


def test_key_slots() -> None:
    image, disk, _ = filled("luks", 7, 0)
    amend(disk, encrypt_state="active", encrypt_new_secret="new", encrypt_iter_time=1)
    disk.close()
    image.key = "new"
    image.check()
    disk = image.open()
    amend(disk, encrypt_state="inactive", encrypt_old_secret="key", size=64 * KIB)
    disk.close()
    del image.content[64 * KIB :]
    image.check()
    image.key = "key"
    with pytest.raises(LaminaError, match="Invalid password"):
        image.open()


def test_names_of_snapshots_and_unknown_extensions_survive() -> None:
    image, disk, _ = filled("plain", 8, 2)
    header_of(disk).unknown_extensions.append((0x12345678, b"whatever this is"))
    amend(disk, compat="0.10")
    amend(disk, compat="1.1")
    disk.close()
    assert image.check().unknown_extensions == [(0x12345678, b"whatever this is")]
