"""VHDX images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.block.limits import WriteFlags
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.vhdx.create import create
from lamina.formats.vhdx.headers import Headers
from lamina.formats.vhdx.layout import new_guid
from lamina.formats.vhdx.log import Change, pack_entry
from lamina.formats.vhdx.opening import open_disk
from lamina.formats.vhdx.options import VhdxCreateOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile
from lamina.units import MIB

WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")
READ_ONLY = NodeOptions(read_only=True, filename="memory")


class CreateHere:
    """A ``CreateContext`` of which only the parent matters."""

    filename = "memory"

    def __init__(self, parent: Node | None) -> None:
        self.parent = parent

    def backing_node(self, *, needed: bool = False) -> Node | None:
        return self.parent


def make(size: int, *, parent: bytes | None = None, **options: Any) -> bytes:
    """The bytes of a new image; ``parent``: those of the image below."""
    file = MemoryFile()
    given = {"block_size": MIB, **options}
    below = None
    if parent is not None:
        given.update(backing_file="below", backing_fmt="vhdx")
        below = open_image(MemoryFile(parent), node_options=READ_ONLY)
    create(VhdxCreateOptions(size=size, **given), file, CreateHere(below))
    return bytes(file.content)


def open_image(
    file: Node,
    *,
    parent: bytes | None = None,
    node_options: NodeOptions = WRITABLE,
    check: bool = False,
) -> Disk:
    below = None
    if parent is not None:
        options = NodeOptions(read_only=True, filename="below")
        below = open_image(MemoryFile(parent, options), node_options=options)
    context = NodesContext(file, backing=below, node_options=node_options)
    context.check = check
    return open_disk(context)


def logged(image: bytes, entries: Sequence[tuple[int, int, int]], *, sectors: int = 2) -> bytes:
    """The image with a log that has to be carried out: entries of (place in the log, sequence
    number, tail), which change the BAT. Each has ``sectors`` data descriptors, then one for 8 KiB
    of zeroes."""
    file = MemoryFile(image)
    headers = Headers(file)
    headers.update(log_guid=new_guid())
    log, length = headers.current.log_offset, headers.current.log_length
    for at, sequence, tail in entries:
        bat = log + length + 4096 * sequence
        states = [bytes([state, *bytes(7)]) * 512 for state in (1, 2, 3)]
        entry = pack_entry(
            [
                *(
                    Change(bat + 8192 * number, 4096, states[(sequence + number) % 3])
                    for number in range(sectors)
                ),
                Change(bat + 8192 * sectors, 8192, None),
            ],
            sequence=sequence,
            tail=tail,
            guid=headers.current.log_guid,
            flushed_size=len(image),
            last_size=len(image) + MIB,
        )
        inside = min(len(entry), length - at)
        file.write(log + at, entry[:inside])
        file.write(log, entry[inside:])
    return bytes(file.content)


def filled(image: bytes, content: bytes) -> bytes:
    """The image with this content from its start."""
    file = MemoryFile(image)
    disk = open_image(file)
    disk.writev([(0, content)], WriteFlags.NONE)
    disk.close()
    return bytes(file.content)
