"""VHD images in memory: blocks of 4 KiB, so that little data needs many of them."""

from __future__ import annotations

import struct

from lamina.block.driver import CheckResult, Fix
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.vpc import DRIVER
from lamina.formats.vpc.create import write_free
from lamina.formats.vpc.geometry import EXACT, LARGEST
from lamina.formats.vpc.layout import DIFFERENCING, DYNAMIC, FIXED, NOWHERE, Footer, Header, Locator
from lamina.formats.vpc.opening import open_disk
from lamina.formats.vpc.options import VpcOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

UNIT = 4096
BLOCK = 512 + UNIT
"""Bytes of a block in the file."""
TABLE = 0x600
NOTHING, LEAKS, ALL = Fix(), Fix(leaks=True), Fix(leaks=True, errors=True)
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")
ID = b"0123456789abcdef"
NAME = "below.vhd".encode("utf-16-le")


def footer(size: int, disk_type: int = DYNAMIC, identity: bytes = ID) -> Footer:
    """Of a disk that is exactly so large."""
    place = NOWHERE if disk_type == FIXED else 512
    return Footer(size, disk_type, LARGEST, place, creator=EXACT, unique_id=identity)


def make(size: int, *, unit: int = UNIT, parent: bytes = b"", identity: bytes = ID) -> bytes:
    """A dynamic image; a differencing one with the unique id of its parent."""
    about = footer(size, DIFFERENCING if parent else DYNAMIC, identity)
    header = Header(TABLE, -(-size // unit), unit)
    if parent:
        locator = Locator(b"W2ru", 1, len(NAME), TABLE)
        header = Header(
            TABLE + 512, -(-size // unit), unit, parent, parent_name="p", locators=(locator,)
        )
    file = MemoryFile(about.pack() + header.pack())
    if parent:
        file.write(TABLE, NAME.ljust(512, b"\0"))
    write_free(file, header.table_offset, header.table_end)
    file.write(header.table_end, about.pack())
    return bytes(file.content)


def fixed(size: int) -> bytes:
    return bytes(size) + footer(size, FIXED).pack()


def open_image(
    file: Node,
    backing: Node | None = None,
    *,
    check: bool = False,
    mode: str | None = None,
    **children: Node,
) -> Disk:
    """``parent``: what is found by the name of another parent."""
    context = NodesContext(file, backing=backing, **children)
    context.check = check
    return open_disk(VpcOptions(mode), context)


def check(content: bytes, fix: Fix = NOTHING) -> tuple[CheckResult, list[str], bytes]:
    """What a check finds and says, and the image afterwards."""
    file = MemoryFile(content, NodeOptions(read_only=fix == NOTHING, filename="memory"))
    lines: list[str] = []
    disk = open_image(file, MemoryFile(b""), check=True)
    result = DRIVER.check(disk, fix, lines.append)
    disk.close()
    return result, lines, bytes(file.content)


def resum(image: bytearray, start: int, length: int, at: int) -> None:
    """Make the checksum of a structure right again. Offsets and length in bytes."""
    image[start + at : start + at + 4] = bytes(4)
    total = ~sum(image[start : start + length]) & 0xFFFFFFFF
    struct.pack_into(">I", image, start + at, total)
