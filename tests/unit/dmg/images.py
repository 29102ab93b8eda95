"""DMGs in memory, with whatever is wanted in them."""

from __future__ import annotations

import base64
import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lzfse

from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.dmg.mapping import DmgMapping
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

ZERO, RAW, IGNORE, END = 0, 1, 2, 0xFFFFFFFF


def adc(data: bytes) -> bytes:
    """Literals, and runs of one byte as copies at a distance of one."""
    out = bytearray()
    at = 0
    while at < len(data):
        run = 1
        while at + run < len(data) and data[at + run] == data[at] and run < 68:
            run += 1
        if run > 19:
            out += bytes([0x80, data[at], 0x40 | run - 1 - 4, 0, 0])
        elif run > 4:
            out += bytes([0x80, data[at], (run - 1 - 3) << 2, 0])
        else:
            out += bytes([0x80 | run - 1]) + data[at : at + run]
        at += run
    return bytes(out)


ENCODERS: dict[int, Callable[[bytes], bytes]] = {
    0x80000004: adc,
    0x80000005: zlib.compress,
    0x80000006: bz2.compress,
    0x80000007: lzfse.compress,
    0x80000008: lzma.compress,
}


class Row(NamedTuple):
    type: int
    sector: int
    """From the start of the table."""
    count: int
    offset: int
    length: int


def checksum(value: int | None) -> bytes:
    if value is None:
        return bytes(136)
    return struct.pack(">III124x", 2, 32, value)


def table(first: int, rows: Sequence[Row], crc: int | None = None, data_offset: int = 0) -> bytes:
    sectors = max((row.sector + row.count for row in rows), default=0)
    head = struct.pack(">4sIQQQII24x", b"mish", 1, first, sectors, data_offset, 2056, 0)
    body = b"".join(struct.pack(">IIQQQQ", row.type, 0, *row[1:]) for row in rows)
    return head + checksum(crc) + struct.pack(">I", len(rows)) + body


def property_list(tables: Sequence[bytes]) -> bytes:
    entries = "".join(
        f"<dict><key>ID</key><string>{number}</string><key>Data</key>\n<data>\n"
        f"{base64.encodebytes(one).decode()}</data></dict>"
        for number, one in enumerate(tables)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST '
        '1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0"><dict>'
        f"<key>resource-fork</key><dict><key>plst</key><array/><key>blkx</key><array>{entries}"
        "</array></dict></dict></plist>"
    ).encode()


def resource_fork(tables: Sequence[bytes]) -> bytes:
    data = b"".join(struct.pack(">I", len(one)) + one for one in (*tables, b"something else"))
    head = struct.pack(">IIII", 256, 256 + len(data), len(data), 30)
    return head.ljust(256, b"\0") + data + bytes(30)


def image(
    fork: bytes,
    tables: Sequence[bytes],
    sectors: int,
    *,
    binary: bool = False,
    plist: bytes | None = None,
    front: bytes = b"",
    data_crc: int | None = None,
    master_crc: int | None = None,
    segments: int = 1,
) -> bytes:
    """``front``: what stands before the data fork."""
    names = resource_fork(tables) if binary else property_list(tables) if plist is None else plist
    place = (len(front) + len(fork), len(names))
    trailer = struct.pack(">4sIIIQQQ", b"koly", 4, 512, 1, 0, len(front), len(fork))
    trailer += struct.pack(">QQ", *(place if binary else (0, 0)))
    trailer += struct.pack(">II16x", 1, segments) + checksum(data_crc)
    trailer += struct.pack(">QQ120x", *((0, 0) if binary else place))
    trailer += checksum(master_crc) + struct.pack(">IQ12x", 1, sectors)
    assert len(trailer) == 512
    return front + fork + names + trailer


def pack(
    content: bytes,
    kinds: Sequence[int] = (0x80000005,),
    *,
    chunk: int = 100,
    partitions: int = 2,
    binary: bool = False,
    front: bytes = b"",
) -> bytes:
    """A disk in chunks of so many sectors, of these kinds in turn, with all checksums.

    Chunks of zeroes are ignored or filled with zeroes, in turn.
    """
    fork = bytearray()
    tables = []
    sums = b""
    sectors = len(content) // 512
    zeroes = 0
    for number in range(partitions):
        first, last = sectors * number // partitions, sectors * (number + 1) // partitions
        rows = []
        crc = 0
        for index, start in enumerate(range(first, last, chunk)):
            count = min(chunk, last - start)
            data = content[start * 512 : (start + count) * 512]
            kind = kinds[index % len(kinds)]
            stored = b""
            if not any(data):
                zeroes += 1
                kind = IGNORE if zeroes % 2 else ZERO
            else:
                stored = data if kind == RAW else ENCODERS[kind](data)
            if kind != IGNORE:
                crc = zlib.crc32(data, crc)
            rows.append(Row(kind, start - first, count, len(fork), len(stored)))
            fork += stored
        rows.append(Row(END, last - first, 0, len(fork), 0))
        sums += struct.pack(">I", crc)
        tables.append(table(first, rows, crc))
    return image(
        bytes(fork),
        tables,
        sectors,
        binary=binary,
        front=front,
        data_crc=zlib.crc32(fork),
        master_crc=zlib.crc32(sums),
    )


def open_image(content: bytes, **options: bool) -> Disk:
    given = NodeOptions(filename="memory", **{"read_only": True, **options})
    file: Node = MemoryFile(content, given)
    return Disk(NodesContext(file, node_options=given), DmgMapping)
