"""Streams: in the order in which somebody reads them who cannot go back."""

from __future__ import annotations

import random
import struct
import time
import zlib

import pytest

import lamina
from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.session import Session
from lamina.errors import Refused, StorageError
from lamina.formats.vmdk import DRIVER
from lamina.formats.vmdk.create import stream_header
from lamina.formats.vmdk.layout import (
    GRAIN_MARKER_SIZE,
    MARKER_DIRECTORY,
    MARKER_END,
    MARKER_FOOTER,
    MARKER_TABLE,
    parse_header,
    parse_marker,
)
from lamina.testing.memory import MemoryFile
from tests.unit.vmdk.images import GRAIN, TABLE, open_image, stream

SIZE = 3 * TABLE * GRAIN


def read_in_order(image: bytes) -> dict[int, bytes]:
    """What a reader learns that sees every byte once. Raises AssertionError."""
    header = parse_header(image[:512])
    assert header.directory_offset == -1
    at = header.overhead
    grains: dict[int, bytes] = {}
    places: dict[int, int] = {}
    tables: list[tuple[int, tuple[int, ...]]] = []
    directory: tuple[int, ...] = ()
    directory_at = 0
    last = -1
    while True:
        marker = parse_marker(image[at : at + 16])
        if marker.size:
            assert marker.value * 512 > last, "grains are in order"
            last = marker.value * 512
            start = at + GRAIN_MARKER_SIZE
            grains[last] = zlib.decompress(image[start : start + marker.size])
            places[last // header.grain] = at // 512
            at += -(-(GRAIN_MARKER_SIZE + marker.size) // 512) * 512
            continue
        at += 512
        body = image[at : at + marker.value * 512]
        if marker.kind == MARKER_TABLE:
            tables.append((at // 512, struct.unpack(f"<{header.table_entries}I", body)))
        elif marker.kind == MARKER_DIRECTORY:
            directory = struct.unpack_from(f"<{header.directory_entries}I", body)
            directory_at = at
        elif marker.kind == MARKER_FOOTER:
            assert parse_header(body).directory_offset == directory_at
        else:
            assert marker.kind == MARKER_END
            break
        at += marker.value * 512
    assert at == len(image), "the stream ends with the file"
    known = dict(tables)
    assert [table for table in directory if table] == [place for place, _ in tables]
    named = {
        number * header.table_entries + index: sector
        for number, table in enumerate(directory)
        if table
        for index, sector in enumerate(known[table])
        if sector
    }
    assert named == places
    return grains


def test_one_pass() -> None:
    rng = random.Random(1)
    file = MemoryFile(stream(SIZE))
    disk = open_image(file)
    model = {}
    for number in (0, 1, 2, 100, 127, 128, 129, 300, 383):
        model[number * GRAIN] = rng.randbytes(100).ljust(GRAIN, b"x")
        disk.write(number * GRAIN, model[number * GRAIN])
    disk.close()
    assert read_in_order(bytes(file.content)) == model
    # Written to again, it still is a stream.
    disk = open_image(file)
    model[384 * GRAIN - GRAIN - GRAIN] = b"y" * GRAIN
    disk.flush()
    assert read_in_order(bytes(file.content)).keys() <= model.keys()
    with pytest.raises(StorageError):
        disk.write(0, b"z" * GRAIN)
    assert disk.context.warnings == [
        "error: Could not write to allocated cluster for streamOptimized"
    ]
    disk.close()
    assert open_image(file).read(0, GRAIN) == model[0]


def test_flushes_in_the_middle_leave_no_end_there() -> None:
    file = MemoryFile(stream(SIZE))
    disk = open_image(file)
    for number in range(5):
        disk.write(number * GRAIN, bytes([number + 1]) * GRAIN)
        disk.flush()
        # What a crash would leave is readable.
        again = open_image(MemoryFile(bytes(file.content)))
        assert again.read(number * GRAIN, 1) == bytes([number + 1])
    disk.close()
    disk = open_image(MemoryFile(file.content))
    assert not DRIVER.check(disk, Fix(), print).corruptions
    assert disk.read(4 * GRAIN, 1) == b"\5"


def test_what_lies_behind_the_directory_is_kept() -> None:
    """Streams of others may end in other ways: nothing is overwritten then."""
    file = MemoryFile(stream(SIZE))
    disk = open_image(file)
    disk.write(0, b"a" * GRAIN)
    disk.close()
    image = bytearray(file.content)
    # A sector between the directory and the footer.
    image[-3 * 512 : -3 * 512] = b"kept" * 128
    file = MemoryFile(image)
    disk = open_image(file)
    disk.write(GRAIN, b"b" * GRAIN)
    disk.close()
    assert b"kept" * 128 in file.content
    again = open_image(MemoryFile(file.content))
    assert again.read(0, 2 * GRAIN) == b"a" * GRAIN + b"b" * GRAIN
    # Two directories and a footer: only read.
    image = bytearray(stream(SIZE))
    for header in (0, len(image) - 1024):
        image[header + 8] |= 2
        image[header + 48] = 4
    with pytest.raises(Refused, match="only read"):
        open_image(MemoryFile(image))


def test_convert_writes_one_pass(tmp_path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image.vmdk"
    content = random.Random(2).randbytes(1 << 20) + bytes(1 << 20) + b"text" * (10 << 18)
    raw.write_bytes(content)
    session = Session()
    create_image(
        str(image), "vmdk", session=session, options={"subformat": "streamOptimized"},
        size=len(content),
    )
    with lamina.open(raw, format="raw") as source, lamina.open(
        image, format="vmdk", writable=True
    ) as target:
        for offset in range(0, len(content), 1 << 20):
            data = source.pread(1 << 20, offset)
            if any(data):
                target.pwrite(data, offset)
    grains = read_in_order(image.read_bytes())
    found = b"".join(grains.get(at, bytes(65536)) for at in range(0, len(content), 65536))
    assert found == content


def test_large_streams_open_at_once(tmp_path) -> None:
    """60 GiB, every grain there."""
    image = tmp_path / "large.vmdk"
    size = 60 << 30
    create_image(
        str(image), "vmdk", session=Session(), options={"subformat": "streamOptimized"}, size=size
    )
    header = stream_header(size)
    tables = header.directory_entries
    with image.open("r+b") as file:
        old = file.read()
        end = old[header.overhead :]
        first = header.overhead // 512
        for number in range(0, tables, 16):
            file.seek(header.overhead + number * 2048)
            file.write(struct.pack("<512I", *range(first, first + 512)) * 16)
        place = header.overhead + tables * 2048
        directory = struct.pack(f"<{tables}I", *range(first, first + 4 * tables, 4))
        file.seek(place)
        file.write(end[:512] + directory + end[512 + len(directory) : -1024])
        footer = bytearray(end[-1024:-512])
        footer[56:64] = (place // 512 + 1).to_bytes(8, "little")
        file.write(footer + end[-512:])
    start = time.process_time()
    with lamina.open(image, format="vmdk") as opened:
        assert opened.size == size
        assert opened.info().cluster_size == 65536
    assert time.process_time() - start < 1
