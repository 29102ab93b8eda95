"""Fuzzing the pure part of qcow2: bytes in, dataclasses or our errors out."""

from __future__ import annotations

import random
import struct

from lamina.errors import LaminaError
from lamina.formats.qcow2.bitmap_layout import (
    BitmapEntry,
    check_entry,
    check_loadable,
    pack_directory,
    parse_directory,
)
from lamina.formats.qcow2.extensions import BitmapsExtension, CryptoExtension
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    Header,
    compressed_extent,
)
from lamina.formats.qcow2.snapshot_layout import Snapshot, pack_snapshots, parse_snapshots
from tests.fuzz.mutation import mutate

_TABLES = {
    "size": 1 << 30,
    "l1_size": 2,
    "l1_table_offset": 0x30000,
    "refcount_table_offset": 0x10000,
    "refcount_table_clusters": 1,
}


def _headers() -> list[bytes]:
    plain = Header(**_TABLES)
    version_2 = Header(version=2, header_length=72, backing_file="base.raw", **_TABLES)
    rich = Header(
        backing_file="base.qcow2",
        backing_format="qcow2",
        data_file="data.raw",
        bitmaps=BitmapsExtension(2, 64, 0x60000),
        crypto=CryptoExtension(0x50000, 4096),
        unknown_extensions=[(0x12345678, b"kept")],
        autoclear_features=AUTOCLEAR_BITMAPS,
        incompatible_features=4,
        nb_snapshots=1,
        snapshots_offset=0x70000,
        **_TABLES,
    )
    unknown = Header(header_length=128, unknown_tail=b"\1" * 16, **_TABLES)
    unknown.incompatible_features = 1 << 40
    return [header.pack() for header in (plain, version_2, rich, unknown)]


SNAPSHOTS = pack_snapshots(
    [
        Snapshot("1", "one", 0x80000, 2, vm_state_size=5, disk_size=1 << 30),
        Snapshot("2", "two", 0x90000, 2, unknown_extra=b"important"),
    ]
)
BITMAPS = pack_directory(
    [
        BitmapEntry("b0", 0xA0000, 1, 2, 16),
        BitmapEntry("another", 0xB0000, 4, 1, 9),
    ]
)


def fuzz_headers(count: int, seed: int = 0) -> int:
    """Parse ``count`` mutated headers; how many were accepted.

    Raises whatever is not one of our errors. What is accepted can be written and read again.
    """
    rng = random.Random(seed)
    seeds = [(header.ljust(512, b"\0"), len(header)) for header in _headers()]
    accepted = 0
    for number in range(count):
        header, length = seeds[number & 3]
        # The fixed fields more often than extensions and names.
        spans = [(0, 112), (0, 112), (72, length)]
        image = mutate(rng, header, spans)
        try:
            parsed = Header.parse(bytes(image), check=number & 4 == 0)
        except LaminaError:
            continue
        accepted += 1
        if number & 31 == 0:
            _write_again(parsed)
    return accepted


def _write_again(parsed: Header) -> None:
    try:
        packed = parsed.pack()
        again = Header.parse(packed, check=True)
    except LaminaError:
        return
    for name in ("size", "l1_table_offset", "refcount_table_offset", "bitmaps", "crypto"):
        assert getattr(again, name) == getattr(parsed, name), name
    assert again.backing_file == (parsed.backing_file or None)


def fuzz_tables(count: int, seed: int = 0) -> None:
    """The snapshot table, the bitmap directory and compressed cluster descriptors."""
    rng = random.Random(seed)
    header = Header(**_TABLES)
    for number in range(count):
        kind = number % 3
        try:
            if kind == 0:
                table = bytes(mutate(rng, SNAPSHOTS, [(0, len(SNAPSHOTS))]))
                for snapshot in parse_snapshots(table, rng.randrange(4)):
                    assert snapshot.entry_offset + snapshot.entry_length <= len(table) + 8
            elif kind == 1:
                directory = bytes(mutate(rng, BITMAPS, [(0, len(BITMAPS))]))
                for index, entry in enumerate(parse_directory(directory, 2)):
                    check_entry(entry, index, header)
                    check_loadable(entry, index, header)
            else:
                (entry_word,) = struct.unpack(">Q", rng.randbytes(8))
                bits = rng.randrange(9, 22)
                offset, length = compressed_extent(entry_word, bits)
                assert 0 <= offset < 1 << 62
                assert 0 < length <= (512 << (bits - 8))
        except LaminaError:
            continue
