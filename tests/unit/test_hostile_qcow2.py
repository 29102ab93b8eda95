"""Hostile qcow2 and raw images: refused in QEMU's words, within bounded time and memory."""

from __future__ import annotations

import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, StorageError
from lamina.testing.memory import MemoryFile
from tests.unit.opened import opened_files
from tests.unit.qcow2.images import make, open_image, read_only
from tests.unit.qcow2_check.damage import (
    ALL,
    DAMAGES,
    NOTHING,
    UNIT,
    WRITABLE,
    Image,
    damaged,
    run_check,
    sound,
)

SECONDS = 1.0
BYTES = 64 << 20


@contextmanager
def bounded() -> Iterator[None]:
    """What is inside takes less than a second of work and 64 MiB."""
    tracemalloc.start()
    before = time.process_time()
    try:
        yield
        spent = time.process_time() - before
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BYTES
    # Tracing makes everything several times slower.
    assert spent < 4 * SECONDS


def field(offset: int, format: str, value: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(">" + format, image, offset, value)


def both(*changes: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def change(image: bytearray) -> None:
        for one in changes:
            one(image)

    return change


HUGE = 1 << 62
NEAR_2_63 = 0x7FFFFFFFFFFF0000

HEADERS: list[tuple[str, Callable[[bytearray], None], str]] = [
    ("backing offset", field(8, "Q", 0x20000), "Invalid backing file offset"),
    ("backing offset huge", field(8, "Q", (1 << 64) - 1), "Invalid backing file offset"),
    (
        "backing size",
        both(field(8, "Q", 0x1000), field(16, "I", 2000)),
        "Backing file name too long",
    ),
    (
        "backing size huge",
        both(field(8, "Q", 0x1000), field(16, "I", 0xFFFFFFFF)),
        "Backing file name too long",
    ),
    ("cluster bits 8", field(20, "I", 8), "Unsupported cluster size: 2^8"),
    ("cluster bits 22", field(20, "I", 22), "Unsupported cluster size: 2^22"),
    (
        "cluster bits huge",
        field(20, "I", 0xFFFFFFFF),
        "Unsupported cluster size: 2^4294967295",
    ),
    ("crypt method", field(32, "I", 9), "Unsupported encryption method 9"),
    ("compression type", field(104, "B", 5), "qcow2: unknown compression type: 5"),
    ("header length 96", field(100, "I", 96), "qcow2 header too short"),
    ("header length huge", field(100, "I", 0x20000), "qcow2 header exceeds cluster size"),
    ("L1 size huge", field(36, "I", 0x7FFFFFFF), "Active L1 table too large"),
    ("L1 size 0", field(36, "I", 0), "L1 table is too small"),
    ("L1 offset unaligned", field(40, "Q", 0x30200), "Active L1 table offset invalid"),
    ("L1 offset huge", field(40, "Q", (1 << 64) - 65536), "Active L1 table offset invalid"),
    ("magic", field(0, "I", 0x12345678), "Image is not in qcow2 format"),
    (
        "refcount order",
        field(96, "I", 7),
        "Reference count entry width too large; may not exceed 64 bits",
    ),
    (
        "refcount table clusters 0",
        field(56, "I", 0),
        "Image does not contain a reference count table",
    ),
    (
        "refcount table clusters huge",
        field(56, "I", 0xFFFFFFFF),
        "Reference count table too large",
    ),
    (
        "refcount table offset",
        both(field(48, "Q", NEAR_2_63), field(56, "I", 2)),
        "Reference count table offset invalid",
    ),
    ("size", field(24, "Q", HUGE), "Image is too big"),
    ("snapshots", field(60, "I", 70000), "Snapshot table too large"),
    (
        "snapshot table unaligned",
        both(field(60, "I", 1), field(64, "Q", 0x1234)),
        "Snapshot table offset invalid",
    ),
    ("version", field(4, "I", 4), "Unsupported qcow2 version 4"),
    (
        "unknown feature",
        field(72, "Q", 1 << 63),
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000",
    ),
    (
        "extension huge",
        both(field(112, "I", 0x12345678), field(116, "I", 0x7FFFFFFF)),
        "Header extension too large",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS]
)
@pytest.mark.parametrize("inspect", [True, False], ids=["inspect", "open"])
def test_header(change: Callable[[bytearray], None], message: str, inspect: bool) -> None:
    image = bytearray(make(1 << 30))
    change(image)
    with bounded(), pytest.raises(LaminaError) as caught:
        open_image(read_only(bytes(image)), inspect=inspect)
    assert str(caught.value) == message


def test_every_truncation() -> None:
    """A file that ends anywhere opens or is refused; what is missing reads as zeroes."""
    image = make(1 << 20)
    for length in [*range(0, 600, 7), *range(600, len(image), 9973)]:
        try:
            disk = open_image(read_only(image[:length]))
        except (ImageCorrupt, ImageUnsupported):
            continue
        assert disk.read(0, 4096) == bytes(4096)


def test_dirty_corrupt_and_data_file_bits_are_shown() -> None:
    image = bytearray(make(1 << 20))
    field(72, "Q", 7)(image)
    info = open_image(read_only(bytes(image)), inspect=True).info()
    assert info.dirty
    assert info.specific is not None
    assert info.specific["corrupt"] is True
    assert info.specific["data-file-raw"] is False


def test_a_write_that_would_hit_a_table_marks_the_image() -> None:
    image = Image(sound())
    image.put(image.entry(0), image.l1 | 1 << 63)
    file = MemoryFile(bytes(image.content))
    disk = open_image(file, node_options=WRITABLE)
    with pytest.raises(ImageCorrupt) as caught:
        disk.write(0, b"x" * UNIT)
    assert "overlaps with active L1 table" in str(caught.value.field)
    with pytest.raises(StorageError):
        disk.read(0, 10)
    disk.close()
    assert file.content[79] & 2
    with pytest.raises(LaminaError) as refused:
        open_image(file, node_options=WRITABLE)
    assert str(refused.value) == "qcow2: Image is corrupt; cannot be opened read/write"
    assert open_image(read_only(bytes(file.content))).read(UNIT, 4) == b"\2\2\2\2"
    run_check(file, ALL)
    open_image(file, node_options=WRITABLE).close()


def test_an_unaligned_entry_fails_the_read() -> None:
    image = Image(sound())
    image.change(image.entry(0), set=0x200)
    disk = open_image(read_only(bytes(image.content)))
    with pytest.raises(ImageCorrupt) as caught:
        disk.read(0, 512)
    assert str(caught.value) == "Input/output error"
    assert caught.value.offset == image.entry(0)


@pytest.mark.parametrize(
    "damage", DAMAGES, ids=lambda damage: damage.name.replace(" ", "-")
)
def test_damaged_tables_cost_little(damage: Any) -> None:
    content = damaged(damage)
    with bounded():
        for fix in (NOTHING, ALL):
            run_check(MemoryFile(content), fix)
        try:
            disk = open_image(read_only(content))
            disk.read(0, disk.size)
            for _ in disk.columns(0, disk.size):
                pass
        except LaminaError:
            pass


COMPRESSED = 1 << 62


@pytest.mark.parametrize(
    "entry",
    [
        COMPRESSED | (1 << 54) - 1,
        COMPRESSED | 0x3F << 56 | 0x5000,
        COMPRESSED | 0x1234,
        COMPRESSED | (1 << 61) - 1,
    ],
)
def test_a_compressed_cluster_that_is_none(entry: int) -> None:
    """Garbage, truncated, or behind the end: an error, never a loop."""
    image = Image(sound())
    image.put(image.entry(0), entry)
    disk = open_image(read_only(bytes(image.content)))
    with bounded(), pytest.raises(LaminaError):
        disk.read(0, UNIT)
    assert disk.read(UNIT, 4) == b"\2\2\2\2"


def test_an_l1_table_of_32_mib_that_is_not_there() -> None:
    image = bytearray(make(1 << 30))
    field(36, "I", (32 << 20) // 8)(image)
    field(40, "Q", 1 << 40)(image)
    before = time.process_time()
    disk = open_image(read_only(bytes(image)))
    assert disk.read(0, 4096) == bytes(4096)
    run_check(MemoryFile(bytes(image)), NOTHING)
    assert time.process_time() - before < 2 * SECONDS


def test_l1_entries_that_all_name_one_table() -> None:
    """Two million of them: the table is looked at once."""
    image = Image(sound())
    entries = 1 << 21
    place = image.grow(entries * 8 // UNIT)
    image.content[place : place + entries * 8] = image.get(image.l1).to_bytes(8, "big") * entries
    field(36, "I", entries)(image.content)
    image.put(40, place)
    for index in range(512):
        image.put(image.entry(index), image.entry(0) // UNIT * UNIT if index == 0 else 0)
    before = time.process_time()
    result, _ = run_check(MemoryFile(bytes(image.content)), NOTHING)
    assert result.corruptions
    assert time.process_time() - before < 10 * SECONDS


def sparse(path: Path, header: bytes, length: int) -> None:
    path.write_bytes(header)
    os.truncate(path, length)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files of terabytes")
@pytest.mark.parametrize("bits", [9, 16])
def test_a_sparse_file_of_terabytes(bits: int, tmp_path: Path) -> None:
    """What is checked are references, not the length of the file."""
    path = tmp_path / "image"
    image = bytearray(make(1 << 20, cluster_size=1 << bits))
    try:
        sparse(path, bytes(image), 8 << 40)
    except OSError:
        pytest.skip("no such large files here")
    from lamina.block.backend import Backend
    from lamina.block.registry import driver
    from lamina.block.session import Session

    with Backend.open(str(path), session=Session(), format="qcow2", check=True) as opened:
        before = time.process_time()
        result = driver("qcow2").check(opened.node, NOTHING, lambda line: None)
        assert time.process_time() - before < 2 * SECONDS
    assert not result.corruptions


TRICKS = ["/etc/passwd", "json:{}", 'json:{"driver":"file","filename":"/etc/passwd"}', "nbd:x:1"]


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("kind", ["backing", "data file"])
def test_inspecting_opens_nothing_else(kind: str, name: str, tmp_path: Path) -> None:
    from lamina.formats.qcow2.layout import INCOMPAT_DATA_FILE, Header

    path = tmp_path / "image"
    image = bytearray(make(1 << 20))
    header = Header.parse(bytes(image))
    if kind == "backing":
        header.backing_file, header.backing_format = name, "raw"
    else:
        header.data_file = name
        header.incompatible_features |= INCOMPAT_DATA_FILE
    packed = header.pack()
    image[: len(packed)] = packed
    path.write_bytes(image)
    lamina.inspect(str(path))
    assert set(opened_files(lambda: lamina.inspect(str(path)))) <= {str(path)}


# -- raw -------------------------------------------------------------------------------------------


def raw_error(path: Path, **options: object) -> str:
    import json

    given = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}, **options}
    with pytest.raises(LaminaError) as caught:
        lamina.open("json:" + json.dumps(given))
    return str(caught.value)


def test_raw_windows(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(4096))
    assert raw_error(path, offset=5000).endswith(
        "Offset (5000) cannot be greater than size of the containing file (4096)"
    )
    assert raw_error(path, offset=1024, size=4096).endswith(
        "The sum of offset (1024) and size (4096) has to be smaller or equal to the  actual size "
        "of the containing file (4096)"
    )
    assert raw_error(path, size=1000).endswith("Specified size is not multiple of 512")
    # A sum that would wrap around in 64 bits.
    assert "has to be smaller" in raw_error(path, offset=1024, size=(1 << 63) - 512)


def test_a_raw_image_of_any_content_is_data(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(sound())
    with lamina.open(str(path), format="raw") as image:
        assert image.pread(4, 0) == b"QFI\xfb"
