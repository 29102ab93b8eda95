"""VMDKs in memory, with small grains and small tables, so that little data needs many of them."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.vmdk.create import words
from lamina.formats.vmdk.descriptor import ExtentLine, compose
from lamina.formats.vmdk.layout import (
    COMPRESS_DEFLATE,
    COMPRESSED,
    LINE_ENDINGS_VALID,
    MARKERS,
    REDUNDANT,
    ZEROED_GRAINS,
    SparseHeader,
)
from lamina.formats.vmdk.mapping import VmdkMapping
from lamina.formats.vmdk.stream import trailer
from lamina.records import replace
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.units import SECTOR, round_up

GRAIN = 4096
TABLE = 128
"""Entries of a table: one sector."""
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def sparse_extent(
    size: int,
    text: bytes = b"",
    *,
    grain: int = GRAIN,
    zeroed: bool = False,
    tables: bool = True,
    redundant: bool = True,
) -> bytes:
    """A hosted sparse extent. ``tables``: they are there from the start."""
    count = -(-size // (grain * TABLE))
    directory = round_up(4 * count, SECTOR)
    step = directory + (count * SECTOR if tables else 0)
    first = 2048
    second = first + step if redundant else first
    end = second + step
    header = SparseHeader(
        size,
        second,
        round_up(end, grain),
        version=2 if zeroed else 1,
        flags=LINE_ENDINGS_VALID
        | (REDUNDANT if redundant else 0)
        | (ZEROED_GRAINS if zeroed else 0),
        grain=grain,
        descriptor_size=1536,
        table_entries=TABLE,
        redundant_offset=first if redundant else 0,
    )
    image = bytearray(header.overhead)
    image[: SECTOR] = header.pack()
    image[512 : 512 + len(text)] = text
    if tables:
        for offset in (first, second):
            start = (offset + directory) // SECTOR
            image[offset : offset + 4 * count] = words(range(start, start + count))
    return bytes(image)


def monolithic(size: int, *, parent_cid: int | None = None, **layout: object) -> bytes:
    line = ExtentLine("RW", size, "SPARSE", "memory")
    parent = None if parent_cid is None else ("below", parent_cid)
    return sparse_extent(
        size, compose("monolithicSparse", [line], parent=parent).encoded(), **layout
    )


def stream(size: int, *, grain: int = GRAIN) -> bytes:
    """A stream of no grains, as it is created."""
    line = ExtentLine("RW", size, "SPARSE", "memory")
    text = compose("streamOptimized", [line]).encoded()
    count = -(-size // (grain * TABLE))
    directory = round_up(4 * count, SECTOR)
    header = SparseHeader(
        size,
        -1,
        round_up(2048 + directory, grain),
        version=3,
        flags=LINE_ENDINGS_VALID | COMPRESSED | MARKERS,
        grain=grain,
        descriptor_size=1536,
        table_entries=TABLE,
        compression=COMPRESS_DEFLATE,
    )
    footer = replace(header, directory_offset=header.overhead + SECTOR)
    image = (header.pack() + text).ljust(header.overhead, b"\0")
    return image + trailer(footer, bytes(directory))


def split(
    create_type: str, lines: Sequence[ExtentLine], parent_cid: int | None = None
) -> bytes:
    """A descriptor of its own."""
    parent = None if parent_cid is None else ("below", parent_cid)
    return compose(create_type, list(lines), parent=parent).encoded()


def open_image(
    file: Node,
    *extents: Node,
    backing: bytes | Node | None = None,
    options: NodeOptions = WRITABLE,
) -> Disk:
    below = backing
    if isinstance(backing, bytes):
        below = MemoryFile(backing, NodeOptions(read_only=True, filename="below"))
    children = {f"extents.{number}": node for number, node in enumerate(extents)}
    context = NodesContext(file, backing=below, node_options=options, **children)
    return Disk(context, lambda disk: VmdkMapping(disk, context))


def parent_cid_of(disk: Disk) -> int:
    assert isinstance(disk.mapping, VmdkMapping)
    return disk.mapping.descriptor.cid


