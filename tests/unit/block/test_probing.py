from __future__ import annotations

import struct

import pytest

from lamina.block.probing import PROBE_SIZE, probe


def head(*parts: tuple[int, bytes]) -> bytes:
    sector = bytearray(PROBE_SIZE)
    for offset, data in parts:
        sector[offset : offset + len(data)] = data
    return bytes(sector)


def number(value: int) -> bytes:
    return struct.pack("<I", value)


BOCHS = [(0, b"Bochs Virtual HD Image"), (32, b"Redolog"), (48, b"Growing")]
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"

# Each row was shown to qemu-img 10.0.2.
SECTORS = [
    ("raw", head()),
    ("raw", b""),
    ("bochs", head(*BOCHS, (64, number(0x20000)))),
    ("bochs", head(*BOCHS, (64, number(0x10000)))),
    ("raw", head(*BOCHS, (64, number(0x30000)))),
    ("raw", head(*BOCHS[:2], (48, b"Undoable"), (64, number(0x20000)))),
    ("parallels", head((0, b"WithoutFreeSpace"), (16, number(2)))),
    ("parallels", head((0, b"WithouFreSpacExt"), (16, number(2)))),
    ("raw", head((0, b"WithouFreSpacExt"), (16, number(1)))),
    ("luks", head((0, b"LUKS\xba\xbe\0\x01"))),
    ("raw", head((0, b"LUKS\xba\xbe\0\x02"))),
    ("raw", head((0, b"QFI\xfb\0\0\0\0"))),
    ("qcow", head((0, b"QFI\xfb\0\0\0\x01"))),
    ("qcow2", head((0, b"QFI\xfb\0\0\0\x02"))),
    ("qcow2", head((0, b"QFI\xfb\0\0\0\x09"))),
    ("qcow2", b"QFI\xfb\0\0\0\x03"),
    ("qed", head((0, b"QED\0"))),
    ("vhdx", head((0, b"vhdxfile"))),
    ("vpc", head((0, b"conectix"))),
    ("vdi", head((64, number(0xBEDA107F)))),
    ("vpc", head((0, b"conectix"), (64, number(0xBEDA107F)))),
    ("vmdk", head((0, b"KDMV"))),
    ("vmdk", head((0, b"COWD"))),
    ("vmdk", head((0, b"# Disk DescriptorFile\n  \nversion=3\r\n"))),
    ("raw", head((0, b"# Disk DescriptorFile\n\nversion=3\n"))),
    ("raw", head((0, b"version=4\n"))),
    ("raw", head((0, b"version=1"))),
    ("raw", head((0, b"version=1 \n"))),
    ("raw", head((0, b"CID=1\nversion=1\n"))),
    ("cloop", head((0, CLOOP))),
    ("raw", head((0, CLOOP[:-2]))),
]


@pytest.mark.parametrize(("expected", "sector"), SECTORS)
def test_sectors(expected: str, sector: bytes) -> None:
    assert probe(sector) == expected


def test_a_disk_image_of_apple_is_known_by_its_name_alone() -> None:
    assert probe(head(), "x.dmg") == "dmg"
    assert probe(head((0, b"QFI\xfb\0\0\0\x02")), "x.dmg") == "qcow2"
