"""Parallels images in memory."""

from __future__ import annotations

import struct
from hashlib import md5

from lamina.block.driver import CheckResult, Fix
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.parallels import DRIVER
from lamina.formats.parallels.layout import SIZE, Header
from lamina.formats.parallels.mapping import ParallelsMapping
from lamina.formats.parallels.options import ParallelsOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.units import round_up

UNIT = 1024
ALL = Fix(leaks=True, errors=True)


def empty_image(
    size: int, unit: int = UNIT, *, by_cluster: bool = True, data_start: int | None = None
) -> bytes:
    """``data_start`` in sectors; None: what belongs there."""
    entries = -(-size // unit)
    table_end = SIZE + 4 * entries
    data_offset = round_up(table_end, unit if by_cluster else 512)
    if data_start is None:
        data_start = data_offset // 512
    header = Header(unit // 512, entries, size // 512, data_start, by_cluster)
    return header.pack().ljust(data_offset, b"\0")


def open_image(
    file: Node, backing: bytes | None = None, *, check: bool = False, prealloc: int = 0
) -> Disk:
    below = None
    if backing is not None:
        below = MemoryFile(backing, NodeOptions(read_only=True, filename="below"))
    context = NodesContext(file, backing=below)
    context.check = check
    options = ParallelsOptions(prealloc_size=prealloc)
    return Disk(context, lambda disk: ParallelsMapping(disk, options, context))


NOTHING = Fix()


def verify(content: bytes, fix: Fix = NOTHING) -> tuple[CheckResult, list[str], bytes]:
    """What a check says, its lines, and the file afterwards."""
    read_only = fix == NOTHING
    file = MemoryFile(content, NodeOptions(read_only=read_only, filename="memory"))
    disk = open_image(file, check=True)
    lines: list[str] = []
    result = DRIVER.check(disk, fix, lines.append)
    disk.close()
    return result, lines, bytes(file.content)


def table(content: bytes) -> list[int]:
    entries = struct.unpack_from("<I", content, 32)[0]
    return list(struct.unpack_from(f"<{entries}I", content, SIZE))


def with_extension(content: bytes, features: bytes, *, in_use: int = 0x312E3276) -> bytes:
    """The image with a format extension in a cluster at its end."""
    unit = struct.unpack_from("<I", content, 28)[0] * 512
    content += bytes(-len(content) % unit)
    body = (features + bytes(24)).ljust(unit - 24, b"\0")
    cluster = struct.pack("<Q", 0xAB234CEF23DCEA87) + md5(body).digest() + body
    changed = bytearray(content + cluster)
    struct.pack_into("<I", changed, 44, in_use)
    struct.pack_into("<Q", changed, 56, len(content) // 512)
    return bytes(changed)


def bitmap_feature(
    sectors: int, places: list[int], *, granularity: int = 8, magic: int = 0x20385FAE252CB34A,
    flags: int = 0, identity: bytes = bytes(range(16)),
) -> bytes:
    data = struct.pack("<Q16sII", sectors, identity, granularity, len(places))
    data += struct.pack(f"<{len(places)}Q", *places)
    head = struct.pack("<QQII", magic, flags, len(data), 0)
    return head + data.ljust(round_up(len(data), 8), b"\0")
