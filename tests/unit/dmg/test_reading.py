"""Disks out of DMGs: every kind of chunk, wherever it lies."""

from __future__ import annotations

import random
import threading
import zlib

import pytest

from lamina.block.extents import Kind
from lamina.errors import ImageCorrupt, Refused
from lamina.testing.readers import ReaderConformance
from tests.unit.dmg.images import (
    ENCODERS,
    END,
    IGNORE,
    RAW,
    ZERO,
    Row,
    image,
    open_image,
    pack,
    table,
)

ZLIB = 0x80000005


class TestZlib(ReaderConformance):
    def make(self, content):
        return open_image(pack(content))


class TestEveryKind(ReaderConformance):
    seeds = 1

    def make(self, content):
        return open_image(pack(content, (RAW, *ENCODERS), chunk=77, partitions=3, front=b"#" * 999))


class TestRawInResourceFork(ReaderConformance):
    def make(self, content):
        return open_image(pack(content, (RAW,), chunk=64, binary=True))


class TestOneChunk(ReaderConformance):
    """Whoever reads a part has all of it decoded, once."""

    def make(self, content):
        return open_image(pack(content, chunk=1 << 17, partitions=1))


@pytest.mark.parametrize("kind", [RAW, *ENCODERS])
def test_each_kind(kind):
    content = random.Random(kind).randbytes(40_960) + b"a" * 512 + b"abc" * 40_960
    disk = open_image(pack(content, (kind,)))
    assert disk.read(0, len(content)) == content


def test_tables_and_chunks_in_any_order():
    parts = [bytes([number]) * 512 for number in range(1, 7)]
    fork = b"".join(parts)
    late = table(4, [Row(RAW, 1, 1, 5 * 512, 512), Row(RAW, 0, 1, 4 * 512, 512)])
    early = table(0, [Row(RAW, n, 1, n * 512, 512) for n in (2, 0, 3, 1)])
    disk = open_image(image(fork, [late, early], 6))
    assert disk.read(0, 6 * 512) == fork
    assert [one.kind for one in disk.extents(0, 6 * 512)] == [Kind.DATA]


def test_offsets_of_fork_and_table_add_up():
    content = b"q" * 1024
    rows = [Row(RAW, 0, 2, 30, 1024)]
    disk = open_image(image(b"_" * 130 + content, [table(0, rows, None, 100)], 2, front=b"-" * 77))
    assert disk.read(0, 1024) == content


def test_what_no_chunk_holds_cannot_be_read():
    rows = [Row(RAW, 0, 1, 0, 512), Row(ZERO, 3, 1, 0, 0)]
    disk = open_image(image(b"x" * 512, [table(0, rows)], 6))
    assert disk.read(0, 512) == b"x" * 512
    assert disk.read(3 * 512, 512) == bytes(512)
    kinds = [(one.guest_offset // 512, one.kind) for one in disk.extents(0, 6 * 512)]
    assert kinds == [(0, Kind.DATA), (1, Kind.ENCODED), (3, Kind.ZERO), (4, Kind.ENCODED)]
    for sector in (1, 2, 4, 5):
        with pytest.raises(ImageCorrupt, match="Input/output error"):
            disk.read(sector * 512, 512)


@pytest.mark.parametrize(
    "row",
    [
        Row(0x80000010, 0, 1, 0, 512),
        Row(RAW, 0, 1, 1 << 40, 512),
        Row(RAW, 0, 1, (1 << 64) - 1, 512),
        Row(RAW, 0, 2, 0, 1023),
        Row(ZLIB, 0, 1, 0, 1 << 20),
        Row(ZLIB, 0, 1, 0, 0),
        Row(ZLIB, 0, 1, 0, 512),
    ],
)
def test_bad_chunks_do_no_harm_to_others(row):
    good = Row(RAW, 2, 2, 0, 1024)
    disk = open_image(image(b"x" * 1024, [table(0, [row, good])], 4))
    assert disk.read(1024, 1024) == b"x" * 1024
    with pytest.raises(ImageCorrupt, match="Input/output error"):
        disk.read(0, 512)
    unknown = ["warning: Image contains chunks of unknown type 80000010, accessing them will "
               "result in I/O errors"]
    assert disk.context.warnings == (unknown if row.type == 0x80000010 else [])


def test_more_or_less_than_the_sectors():
    data = zlib.compress(b"z" * 1024)
    rows = [Row(ZLIB, 0, 2, 0, len(data)), Row(ZLIB, 2, 1, 0, len(data))]
    rows += [Row(ZLIB, 3, 3, 0, len(data)), Row(END, 6, 0, 0, 0)]
    disk = open_image(image(data, [table(0, rows)], 6))
    assert disk.read(0, 1024) == b"z" * 1024
    for sector in (2, 3):
        with pytest.raises(ImageCorrupt):
            disk.read(sector * 512, 512)


def test_large_chunks_are_decoded_once(monkeypatch):
    """However many readers want parts of them, and though they are larger than the cache."""
    from lamina.codecs import zlib_stream
    from lamina.engine import reader

    content = random.Random(1).randbytes(4096) * (16 << 8)
    disk = open_image(pack(content, chunk=1 << 15, partitions=1))
    assert len(content) == 16 << 20
    decoded = []

    def decode(encoded, length):
        decoded.append(length)
        return zlib_stream.decode(encoded, length)

    monkeypatch.setattr(reader, "_decoder", lambda codec: decode)
    wrong = []

    def work(number):
        offset = number << 20
        if disk.read(offset, 1 << 20) != content[offset : offset + (1 << 20)]:
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert decoded == [16 << 20]


def test_a_reader_that_fails_holds_up_nobody():
    data = zlib.compress(b"z" * 512)
    disk = open_image(image(data, [table(0, [Row(ZLIB, 0, 2, 0, len(data))])], 2))
    for _ in range(3):
        with pytest.raises(ImageCorrupt):
            disk.read(0, 512)


def test_opened_for_writing():
    content = pack(b"x" * 1024)
    with pytest.raises(Refused, match="Image is read-only"):
        open_image(content, read_only=False)
    disk = open_image(content, read_only=False, auto_read_only=True)
    assert disk.read_only
    assert disk.read(0, 1024) == b"x" * 1024


def test_ignored_sectors_read_as_zeroes():
    disk = open_image(image(b"", [table(0, [Row(IGNORE, 0, 1 << 30, 5, 7)])], 1 << 30))
    assert disk.size == 1 << 39
    assert [one.kind for one in disk.extents(0, disk.size)] == [Kind.ZERO]
    assert disk.read(disk.size - 4096, 4096) == bytes(4096)
