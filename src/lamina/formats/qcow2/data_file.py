"""The external data file as a node: opened, shared with others, made for a new image.

The name in the header is a path and nothing else ("External data file name string"): no prefix in
it means anything, and a relative one begins in the working directory, as it does for QEMU.
"""

from __future__ import annotations

from lamina.block.limits import Preallocation
from lamina.block.permissions import Perm
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.options import CreateOptions

ROLE = "data-file"


def open_data_file(disk: Disk, header: Header, context: OpenContext) -> Node | None:
    """Attach the data file that the options or the header name; None: only metadata is wanted.

    Raises UsageError if it is needed and nobody names it, or named and not needed.
    """
    node = context.open_named(
        ROLE, header.data_file or "", driver=None, relative_to=disk, plain=True
    )
    if context.inspect:
        return None
    if not header.has_data_file:
        raise UsageError("'data-file' can only be set for images with an external data file")
    if node is None:
        raise UsageError(
            "'data-file' is required for this image"
            if header.data_file is None
            else "The 'file' block driver requires a file name"
        )
    _, shared = disk.cumulative_permissions()
    disk.attach(ROLE, node, *permissions(disk, shared, disk.read_only))
    return node


def permissions(disk: Disk, shared: Perm, read_only: bool) -> tuple[Perm, Perm]:
    """Guest data may be written by whoever the users of the disk tolerate, but stays as long."""
    need = Perm.CONSISTENT_READ
    if not read_only:
        need |= Perm.WRITE | Perm.RESIZE
    return need, Perm.ALL if disk.options.force_share else shared & ~Perm.RESIZE


def create_data_file(
    options: CreateOptions, header: Header, preallocation: Preallocation, context: CreateContext
) -> Node:
    """A new file for the guest data, as long as the disk; it replaces what is there."""
    assert options.data_file is not None
    allocates = preallocation in (Preallocation.FALLOC, Preallocation.FULL)
    size = 0 if allocates else header.size
    node = context.create_beside(options.data_file, size, from_here=True)
    if preallocation is not Preallocation.OFF:
        # What is mapped has to be there.
        end = round_up(header.size, header.subcluster_size)
        node.truncate(end, preallocation if allocates else Preallocation.OFF)
    return node
