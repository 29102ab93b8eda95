"""Headers, entries and tables of qcow2: what is read is what was written, and nothing is lost."""

from __future__ import annotations

import struct

import pytest

from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError
from lamina.formats.qcow2.extensions import BitmapsExtension, CryptoExtension
from lamina.formats.qcow2.layout import (
    COMPRESSED,
    Header,
    compressed_entry,
    compressed_extent,
)
from lamina.formats.qcow2.snapshot_layout import Snapshot, pack_snapshots, parse_snapshots

from .images import make

UNIT = 65536


def header(**fields: object) -> Header:
    known: dict[str, object] = {
        "size": 1 << 30,
        "l1_size": 2,
        "l1_table_offset": 3 * UNIT,
        "refcount_table_offset": UNIT,
        "refcount_table_clusters": 1,
    }
    return Header(**{**known, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wanted",
    [
        header(),
        header(version=2, header_length=72),
        header(version=2, header_length=72, backing_file="base", backing_format="raw"),
        header(backing_file="/a/b\udcff.qcow2", backing_format="qcow2", data_file="data"),
        header(crypt_method=2, crypto=CryptoExtension(5 * UNIT, 4096)),
        header(
            nb_snapshots=3,
            snapshots_offset=7 * UNIT,
            autoclear_features=1,
            bitmaps=BitmapsExtension(2, 64, 9 * UNIT),
        ),
        header(incompatible_features=8, compression_type=1, refcount_order=0),
        header(compatible_features=1 << 63 | 1, autoclear_features=1 << 40),
        header(header_length=128, unknown_tail=b"what comes later"),
        header(unknown_extensions=[(0x12345678, b"odd"), (0x12345679, b"")]),
    ],
)
def test_headers_survive(wanted: Header) -> None:
    packed = wanted.pack()
    assert Header.parse(packed.ljust(UNIT, b"\0")) == wanted
    # A file may be shorter than its first cluster.
    assert Header.parse(packed) == wanted


def test_a_header_without_the_later_fields() -> None:
    """104 bytes, as written before there was a choice of compression."""
    old = header(header_length=104)
    assert len(old.pack().split(b"dirty bit")[0]) == 104 + 8 + 2
    assert Header.parse(old.pack()) == old


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ImageUnsupported, match="Invalid argument"):
        header(backing_file="x" * 1024, backing_format="raw").pack()
    with pytest.raises(ImageUnsupported, match="No space left on device"):
        header(cluster_bits=9, backing_file="x" * 500, backing_format="raw").pack()


def test_small_clusters_have_no_feature_names() -> None:
    assert b"lazy refcounts" in header(cluster_bits=13).pack()
    assert b"lazy refcounts" not in header(cluster_bits=12).pack()


def poked(*changes: tuple[int, bytes]) -> bytes:
    image = bytearray(make(64 << 20)[:UNIT])
    for offset, data in changes:
        image[offset : offset + len(data)] = data
    return bytes(image)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "big")


def extension(type: int, data: bytes) -> tuple[int, bytes]:
    return 112, struct.pack(">II", type, len(data)) + data.ljust(-(-len(data) // 8) * 8 + 8, b"\0")


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("Image is not in qcow2 format", [(0, b"QFJ")]),
        ("Unsupported qcow2 version 4", [(4, number(4, 4))]),
        ("Unsupported cluster size: 2^8", [(20, number(8, 4))]),
        ("Unsupported cluster size: 2^22", [(20, number(22, 4))]),
        ("qcow2 header too short", [(100, number(96, 4))]),
        ("qcow2 header exceeds cluster size", [(100, number(0x20000, 4))]),
        ("Invalid backing file offset", [(8, number(0x20000))]),
        ("Backing file name too long", [(8, number(0x1000)), (16, number(2000, 4))]),
        ("Backing file name too long", [(8, number(0xFFF0)), (16, number(17, 4))]),
        ("qcow2: unknown compression type: 5", [(104, b"\5")]),
        ("qcow2: Compression type incompatible feature bit must be set", [(104, b"\1")]),
        ("qcow2: Compression type incompatible feature bit must not be set", [(72, number(8))]),
        (
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000010000000020",
            [(72, number(1 << 63 | 1 << 40 | 1 << 5))],
        ),
        (
            "Unsupported qcow2 feature(s): new thing, Unknown incompatible feature: 20",
            [(72, number(1 << 40 | 1 << 5)), extension(0x6803F857, b"\0\x28new thing")],
        ),
        (
            "Reference count entry width too large; may not exceed 64 bits",
            [(96, number(7, 4))],
        ),
        ("Reference count table too large", [(56, number(0xFFFFFF, 4))]),
        ("Image does not contain a reference count table", [(56, number(0, 4))]),
        ("Reference count table offset invalid", [(48, number(0x123))]),
        ("Reference count table offset invalid", [(48, number((1 << 63) - UNIT))]),
        ("Snapshot table too large", [(60, number(65537, 4))]),
        ("Snapshot table offset invalid", [(60, number(1, 4)), (64, number(0x123))]),
        ("Active L1 table too large", [(36, number(0xFFFFFFFF, 4))]),
        ("Active L1 table offset invalid", [(40, number(0x123))]),
        ("L1 table is too small", [(36, number(0, 4))]),
        ("Image is too big", [(24, number(1 << 62))]),
        ("Image is too big", [(24, number(1 << 63))]),
        ("Unsupported encryption method 9", [(32, number(9, 4))]),
        ("Missing CRYPTO header for crypt method 2", [(32, number(2, 4))]),
        ("Header extension too large", [(116, number(0x7FFFFFFF, 4))]),
        (
            "ERROR: ext_backing_format: len=16 too large (>=16)",
            [extension(0xE2792ACA, b"x" * 16)],
        ),
        (
            "CRYPTO header extension only expected with LUKS encryption method",
            [extension(0x0537BE77, bytes(16))],
        ),
        (
            "CRYPTO header extension size 15, but expected size 16",
            [(32, number(2, 4)), extension(0x0537BE77, bytes(15))],
        ),
        (
            "Encryption header offset '291' is not a multiple of cluster size '65536'",
            [(32, number(2, 4)), extension(0x0537BE77, struct.pack(">QQ", 291, 100))],
        ),
        (
            "bitmaps_ext: Invalid extension length",
            [(88, number(1)), extension(0x23852875, bytes(23))],
        ),
        (
            "found bitmaps extension with zero bitmaps",
            [(88, number(1)), extension(0x23852875, bytes(24))],
        ),
        (
            "bitmaps_ext: Reserved field is not zero",
            [(88, number(1)), extension(0x23852875, struct.pack(">IIQQ", 1, 5, 32, UNIT))],
        ),
        (
            "bitmaps_ext: invalid bitmap directory offset",
            [(88, number(1)), extension(0x23852875, struct.pack(">IIQQ", 1, 0, 32, UNIT + 1))],
        ),
    ],
)
def test_bad_fields_are_named(message: str, changes: list[tuple[int, bytes]]) -> None:
    with pytest.raises(LaminaError) as caught:
        Header.parse(poked(*changes))
    assert str(caught.value) == message
    assert caught.value.structure == "header"
    assert caught.value.field
    assert caught.value.offset is not None


def test_what_a_repair_can_mend_is_tolerated() -> None:
    image = poked((56, number(0, 4)), (60, number(70000, 4)))
    assert Header.parse(image, check=True).refcount_table_clusters == 0


@pytest.mark.parametrize("bits", [9, 16, 21])
@pytest.mark.parametrize("offset", [0x50000, 0x50001, 0x501FF, 0x12345678])
@pytest.mark.parametrize("length", [1, 2, 511, 512, 513])
def test_compressed_descriptors(bits: int, offset: int, length: int) -> None:
    entry = compressed_entry(offset, length, bits)
    assert entry & COMPRESSED
    start, room = compressed_extent(entry, bits)
    assert start == offset
    assert length <= room < length + 512
    assert (start + room) % 512 == 0


def test_the_descriptor_of_the_specification() -> None:
    """0x5400000000050000: at 0x50000, 80 sectors more than the first."""
    assert compressed_extent(0x5400000000050000, 16) == (0x50000, 81 * 512)


def test_snapshots_survive() -> None:
    snapshots = [
        Snapshot("1", "first", 5 * UNIT, 2, 1_700_000_000, 5, 10**12, 1 << 33, 1 << 30, 77),
        Snapshot("2", "sch\u00f6n", 6 * UNIT, 2, disk_size=1 << 30, unknown_extra=b"later"),
    ]
    table = pack_snapshots(snapshots)
    found = parse_snapshots(table + b"rest", 2)
    assert [s.entry_length for s in found] == [
        len(pack_snapshots([snapshot])) for snapshot in snapshots
    ]
    assert pack_snapshots(found) == table
    assert [(s.id, s.name, s.vm_state_size, s.icount) for s in found] == [
        ("1", "first", 1 << 33, 77),
        ("2", "sch\u00f6n", 0, None),
    ]


@pytest.mark.parametrize("cut", [1, 39, 41, 60])
def test_a_snapshot_table_that_is_cut(cut: int) -> None:
    table = pack_snapshots([Snapshot("1", "first", UNIT, 1)])
    with pytest.raises(ImageCorrupt, match="too short"):
        parse_snapshots(table[:cut], 1)
