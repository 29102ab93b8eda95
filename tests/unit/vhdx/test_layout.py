"""Structures of VHDX: written, read again, and refused when they break a rule."""

from __future__ import annotations

import random

import pytest

from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError
from lamina.formats.vhdx import layout, locator, metadata
from lamina.formats.vhdx.layout import BAT_REGION, METADATA_REGION, Header, Region, new_guid
from lamina.formats.vhdx.metadata import Item, Parameters
from lamina.units import GIB, KIB, MIB, TIB

REGIONS = [Region(BAT_REGION, 2 * MIB, MIB), Region(METADATA_REGION, 3 * MIB, MIB)]


def header(**changes) -> Header:
    fields = {
        "sequence": 7,
        "file_write_guid": new_guid(),
        "data_write_guid": new_guid(),
        "log_guid": new_guid(),
        "log_offset": MIB,
        "log_length": MIB,
    }
    return Header(**{**fields, **changes})


def test_guids_are_stored_in_the_mixed_order_of_microsoft():
    stored = layout.guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
    assert stored.hex() == "6677c22d23f600429d64115e9bfd4a08"
    assert layout.guid_text(stored) == "2dc27766-f623-4200-9d64-115e9bfd4a08"
    assert layout.guid("{2DC27766-F623-4200-9D64-115E9BFD4A08}") == stored
    for _ in range(20):
        made = new_guid()
        assert layout.guid(layout.guid_text(made)) == made
        assert layout.guid_text(made)[14] == "4"
    with pytest.raises(ValueError, match="no GUID"):
        layout.guid("2dc27766")


def test_the_checksum_is_castagnolis():
    from lamina.codecs.crc32c import crc32c

    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(memoryview(bytearray(b"123456789"))) == 0xE3069283


def test_headers_round_trip():
    one = header()
    assert layout.parse_header(one.pack()) == one
    assert len(one.pack()) == 4096


@pytest.mark.parametrize("at", [0, 4, 8, 20, 66, 4095])
def test_a_header_with_any_byte_changed_is_not_valid(at):
    data = bytearray(header().pack())
    data[at] ^= 1
    assert layout.parse_header(bytes(data)) is None
    assert layout.parse_header(bytes(data[:4000])) is None


def test_the_header_with_the_higher_number_is_in_force():
    low, high = header(sequence=3), header(sequence=4)
    assert layout.current_header((low, high)) == 1
    assert layout.current_header((high, low)) == 0
    assert layout.current_header((None, low)) == 1
    assert layout.current_header((low, None)) == 0
    # disk2vhd writes the same header twice.
    assert layout.current_header((low, low)) == 1
    with pytest.raises(ImageCorrupt, match="No valid VHDX header found"):
        layout.current_header((None, None))
    with pytest.raises(ImageCorrupt, match="same sequence number"):
        layout.current_header((low, header(sequence=3)))


@pytest.mark.parametrize(
    "changes",
    [
        {"log_offset": MIB + 512},
        {"log_offset": 0},
        {"log_length": 0},
        {"log_length": 1000},
        {"log_length": 8 * MIB},
        {"log_offset": 1 << 50},
    ],
)
def test_logs_that_cannot_be(changes):
    layout.check_log(header(), 8 * MIB, used=False)
    with pytest.raises(ImageCorrupt):
        layout.check_log(header(**changes), 8 * MIB, used=False)
    empty = header(**changes, log_guid=layout.NO_GUID)
    layout.check_log(empty, 8 * MIB, used=False)
    with pytest.raises(ImageCorrupt):
        layout.check_log(empty, 8 * MIB, used=True)


def test_logs_of_another_version():
    with pytest.raises(ImageUnsupported, match="log version 1"):
        layout.check_log(header(log_version=1), 8 * MIB, used=False)


def test_region_tables_round_trip():
    regions = [*REGIONS, Region(new_guid(), 5 * MIB, 2 * MIB, required=False)]
    assert layout.parse_regions(layout.pack_regions(regions)) == regions


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (REGIONS[:1], "names 0 metadata regions"),
        (REGIONS[1:], "names 0 BAT regions"),
        ([*REGIONS, Region(BAT_REGION, 5 * MIB, MIB)], "names 2 BAT regions"),
        ([REGIONS[0], Region(METADATA_REGION, 2 * MIB, MIB)], "overlaps with region"),
        ([REGIONS[0], Region(METADATA_REGION, 3 * MIB + 4096, MIB)], "not aligned"),
        ([REGIONS[0], Region(METADATA_REGION, 0, MIB)], "within the headers"),
        ([REGIONS[0], Region(METADATA_REGION, 3 * MIB, 0)], "not aligned"),
        ([*REGIONS, Region(new_guid(), 5 * MIB, MIB)], "is not supported"),
    ],
)
def test_region_tables_that_are_refused(regions, message):
    with pytest.raises(LaminaError, match=message):
        layout.parse_regions(layout.pack_regions(regions))


def test_region_tables_with_a_wrong_checksum_or_too_many_entries():
    table = bytearray(layout.pack_regions(REGIONS))
    table[100] ^= 1
    with pytest.raises(ImageCorrupt, match="checksum"):
        layout.parse_regions(bytes(table))
    table[8:12] = (3000).to_bytes(4, "little")
    with pytest.raises(ImageCorrupt, match="3000 entries"):
        layout.parse_regions(layout.with_checksum(bytes(table)))
    with pytest.raises(ImageCorrupt, match="no signature"):
        layout.parse_regions(bytes(64 * KIB))


def items(*entries: Item) -> bytes:
    return metadata.pack_items(list(entries)).ljust(64 * KIB, b"\0")


def test_metadata_tables_round_trip():
    one = Item(metadata.FILE_PARAMETERS, 64 * KIB, 8, metadata.IS_REQUIRED)
    empty = Item(metadata.VIRTUAL_DISK_ID, 0, 0, 0)
    user = Item(metadata.FILE_PARAMETERS, 70 * KIB, 900, metadata.IS_USER)
    assert metadata.parse_items(items(one, empty, user), MIB) == {one.guid: one, empty.guid: empty}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Item(metadata.FILE_PARAMETERS, 64 * KIB, 8, 0)] * 2, "there twice"),
        ([Item(metadata.FILE_PARAMETERS, 8, 8, 0)], "outside of its region"),
        ([Item(metadata.FILE_PARAMETERS, MIB - 4, 8, 0)], "outside of its region"),
        ([Item(metadata.FILE_PARAMETERS, 64 * KIB, 0xFFFFFFFF, 0)], "outside of its region"),
        ([Item(bytes(16), 64 * KIB, 8, metadata.IS_REQUIRED)], "not supported"),
        ([Item(metadata.FILE_PARAMETERS, 64 * KIB, 8, 5)], "not supported"),
    ],
)
def test_metadata_tables_that_are_refused(entries, message):
    with pytest.raises(LaminaError, match=message):
        metadata.parse_items(items(*entries), MIB)


def test_metadata_tables_with_too_many_entries():
    table = bytearray(items())
    table[10:12] = (2048).to_bytes(2, "little")
    with pytest.raises(ImageCorrupt, match="2048 entries"):
        metadata.parse_items(bytes(table), MIB)
    with pytest.raises(ImageCorrupt, match="no signature"):
        metadata.parse_items(bytes(64 * KIB), MIB)


def test_parameters_round_trip():
    rng = random.Random(1)
    for _ in range(50):
        one = Parameters(
            rng.randrange(64 * TIB),
            1 << rng.randrange(20, 29),
            leave_allocated=rng.random() < 0.5,
            logical_sector=rng.choice(metadata.SECTORS),
            physical_sector=rng.choice(metadata.SECTORS),
            disk_id=new_guid(),
        )
        content = {name: data for name, _, data in one.pack()}
        assert metadata.parse_parameters(content) == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block size 0"),
        ({"block_size": 3 * MIB}, "block size"),
        ({"block_size": 512 * MIB}, "block size"),
        ({"block_size": 512 * KIB}, "block size"),
        ({"size": 1 << 50}, "64 TiB"),
        ({"logical_sector": 0}, "logical sector size 0"),
        ({"logical_sector": 1024}, "logical sector size 1024"),
        ({"has_parent": True}, "no parent locator"),
    ],
)
def test_parameters_that_are_refused(changes, message):
    fields = {"size": GIB, "block_size": MIB, **changes}
    content = {name: data for name, _, data in Parameters(**fields).pack()}
    with pytest.raises(LaminaError, match=message):
        metadata.parse_parameters(content)


def test_missing_items():
    content = {name: data for name, _, data in Parameters(GIB, MIB).pack()}
    for name in content:
        with pytest.raises(ImageCorrupt, match="missing or too short"):
            metadata.parse_parameters({**content, name: content[name][:-1]})


def test_numbers_of_entries():
    """Figures of [MS-VHDX] 2.5: a chunk has 2^23 sectors."""
    one = Parameters(4 * GIB + 1, MIB)
    assert (one.chunk_ratio, one.blocks, one.bat_entries) == (4096, 4097, 4098)
    assert Parameters(4 * GIB, MIB).bat_entries == 4096
    assert Parameters(4 * GIB, MIB, has_parent=True).bat_entries == 4097
    assert Parameters(0, MIB).bat_entries == 0
    assert Parameters(GIB, 256 * MIB).chunk_ratio == 16
    assert Parameters(GIB, 256 * MIB, logical_sector=4096).chunk_ratio == 128


# -- parent locators -------------------------------------------------------------------------------


def test_locators_round_trip():
    entries = {"parent_linkage": "{…}", "relative_path": ".\\größer.vhdx", "x": "y" * 300}
    assert locator.parse(locator.pack(entries)) == entries


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("base.vhdx", "relative_path", ".\\base.vhdx"),
        ("./dir/base.vhdx", "relative_path", ".\\dir\\base.vhdx"),
        ("../base.vhdx", "relative_path", ".\\..\\base.vhdx"),
        ("/images/base.vhdx", "absolute_win32_path", "/images/base.vhdx"),
    ],
)
def test_names_of_parents(name, key, value):
    guid = new_guid()
    entries = locator.for_parent(name, guid)
    assert entries[key] == value
    assert locator.filenames(entries) == [name.removeprefix("./")]
    assert locator.linkages(entries) == [guid]


def test_names_that_windows_writes():
    entries = {
        "parent_linkage": "{2dc27766-f623-4200-9d64-115e9bfd4a08}",
        "parent_linkage2": "{00000000-f623-4200-9d64-115e9bfd4a08}",
        "absolute_win32_path": "C:\\VMs\\base.vhdx",
        "relative_path": "..\\VMs\\base.vhdx",
        "volume_path": "\\\\?\\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\base.vhdx",
    }
    names = locator.filenames(entries)
    assert names[0] == "../VMs/base.vhdx"
    assert names[2] == "file:C:\\VMs\\base.vhdx"
    assert len(locator.linkages(entries)) == 2


def test_relative_names_are_paths_whatever_they_look_like():
    entries = {"relative_path": "nbd:localhost:10809"}
    assert locator.filenames(entries) == ["./nbd:localhost:10809"]
    assert locator.filenames({"relative_path": "json:{}"}) == ["./json:{}"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (bytes(20), "not supported"),
        (locator.pack({"a": "b"})[:24], "no room for its 1 entries"),
        (locator.pack({"a": "b"})[:-1], "outside of it"),
        (locator.pack({"a": ""}), "outside of it"),
        (locator.VHDX_LOCATOR + b"\0\0\xff\xff", "no room for its 65535 entries"),
    ],
)
def test_locators_that_are_refused(data, message):
    with pytest.raises(LaminaError, match=message):
        locator.parse(data)


def test_locators_without_what_is_needed():
    with pytest.raises(ImageCorrupt, match="no path"):
        locator.filenames({"parent_linkage": "{}"})
    with pytest.raises(ImageCorrupt, match="no parent_linkage"):
        locator.linkages({})
    with pytest.raises(ImageCorrupt, match="is no GUID"):
        locator.linkages({"parent_linkage": "base"})
