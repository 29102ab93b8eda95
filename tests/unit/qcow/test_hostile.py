"""Damaged qcow images end in an error that names the field, or in a read."""

from __future__ import annotations

import random
import struct

import pytest

import lamina
from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.qcow.layout import parse
from lamina.testing.memory import MemoryFile
from tests.unit.opened import opened_files
from tests.unit.qcow.images import empty_image, open_image

SIZE = 1 << 20


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "Image not in qcow format"),
        (4, struct.pack(">I", 2), "qcow (v1) does not support qcow version 2"),
        (24, struct.pack(">Q", 0), "Image size is too small (must be at least 2 bytes)"),
        (24, struct.pack(">Q", 1), "Image size is too small (must be at least 2 bytes)"),
        (24, b"\xff" * 8, "Image too large"),
        (24, struct.pack(">Q", 1 << 62), "Image too large"),
        (32, b"\x08", "Cluster size must be between 512 and 64k"),
        (32, b"\x11", "Cluster size must be between 512 and 64k"),
        (33, b"\x05", "L2 table size must be between 512 and 64k"),
        (33, b"\x0e", "L2 table size must be between 512 and 64k"),
        (36, struct.pack(">I", 7), "invalid encryption method in qcow header"),
        (8, struct.pack(">QI", 48, 2000), "Backing file name too long"),
    ],
)
def test_header_fields(offset, data, message):
    image = bytearray(empty_image(SIZE))
    image[offset : offset + len(data)] = data
    with pytest.raises(LaminaError) as caught:
        parse(bytes(image))
    assert str(caught.value) == message
    assert caught.value.offset is not None


def test_wild_pointers():
    """L1 and L2 entries that point anywhere: an error of ours, no hang, no memory."""
    rng = random.Random(1)
    for _ in range(300):
        file = MemoryFile(empty_image(SIZE))
        disk = open_image(file)
        disk.write(0, b"data" * 2000)
        disk.write_compressed([(65536, b"\7" * 512)])
        disk.close()
        image = bytearray(file.content)
        for _ in range(3):
            at = rng.choice([rng.randrange(0, 300), rng.randrange(len(image) - 8)])
            image[at : at + 8] = rng.choice(
                [rng.randbytes(8), b"\xff" * 8, struct.pack(">Q", rng.randrange(len(image)))]
            )
        try:
            disk = open_image(MemoryFile(image))
            disk.read(0, min(disk.size, SIZE))
            disk.write(100, b"x")
            disk.close()
        except LaminaError:
            pass


def test_an_l1_table_that_is_not_there():
    image = bytearray(empty_image(SIZE))
    image[40:48] = struct.pack(">Q", 1 << 60)
    with pytest.raises(ImageCorrupt) as caught:
        open_image(MemoryFile(bytes(image)))
    assert (caught.value.structure, caught.value.field) == ("header", "l1_table_offset")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", 'json:{"driver":"file","filename":"/etc/passwd"}', "nbd:x:1"]
)
def test_inspecting_opens_no_backing_file(name, tmp_path):
    image = bytearray(empty_image(SIZE))
    place = len(image)
    image += name.encode()
    image[8:20] = struct.pack(">QI", place, len(name))
    path = tmp_path / "image"
    path.write_bytes(image)
    assert lamina.inspect(str(path)).backing_filename == name
    assert set(opened_files(lambda: lamina.inspect(str(path)))) <= {str(path)}


def test_inspecting_asks_for_no_key(tmp_path):
    image = bytearray(empty_image(SIZE))
    image[36:40] = struct.pack(">I", 1)
    path = tmp_path / "image"
    path.write_bytes(image)
    assert lamina.inspect(str(path)).encrypted
