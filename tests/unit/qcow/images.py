"""qcow images in memory."""

from __future__ import annotations

from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.qcow.layout import SIZE, Header
from lamina.formats.qcow.mapping import QcowMapping
from lamina.formats.qcow.options import QcowOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.units import round_up


def empty_image(size: int, *, cluster_bits: int = 9, l2_bits: int = 6, backing: bool = False):
    """An image whose tables are small, so that little data needs many of them."""
    name = b"below" if backing else b""
    header = Header(
        size,
        cluster_bits,
        l2_bits,
        round_up(SIZE + len(name), 8),
        backing_offset=SIZE if backing else 0,
        backing_length=len(name),
    )
    image = header.pack() + name
    return image.ljust(header.l1_offset + 8 * header.l1_entries, b"\0")


def open_image(file: Node, backing: bytes | None = None) -> Disk:
    below = None
    if backing is not None:
        below = MemoryFile(backing, NodeOptions(read_only=True, filename="below"))
    context = NodesContext(file, backing=below)
    return Disk(context, lambda disk: QcowMapping(disk, QcowOptions(), context))
