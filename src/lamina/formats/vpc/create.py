"""A new VHD image: fixed, dynamic, or differencing above a parent."""

from __future__ import annotations

import os
import time

from lamina.errors import UsageError
from lamina.formats.vpc import layout
from lamina.formats.vpc.geometry import EXACT, LARGEST, rounded_up
from lamina.formats.vpc.layout import EPOCH, FOOTER_SIZE, FREE, HEADER_SIZE, Footer, Header
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.vpc.options import VpcCreateOptions

_ENTRIES_AT_ONCE = 1 << 18


def create(options: VpcCreateOptions, file: Node, context: CreateContext) -> None:
    """Raises UsageError, StorageError."""
    footer = new_footer(options)
    layout.check_size(footer.current_size)
    if footer.disk_type == layout.FIXED:
        file.truncate(footer.current_size, exact=False)
        file.write(footer.current_size, footer.pack())
        return
    header, content = new_header(footer), b""
    if footer.disk_type == layout.DIFFERENCING:
        header, content = _with_parent(header, options, context)
    file.truncate(0, exact=False)
    write_free(file, header.table_offset, header.table_end)
    if content:
        file.write(FOOTER_SIZE + HEADER_SIZE, content)
    file.write(header.table_end, footer.pack())
    file.flush()
    # What makes the file an image comes last.
    file.write(FOOTER_SIZE, header.pack())
    file.write(0, footer.pack())


def write_free(file: Node, start: int, end: int) -> None:
    """Entries of a table that say that nothing is there. Host offsets."""
    step = 4 * _ENTRIES_AT_ONCE
    for offset in range(start, end, step):
        count = min(step, end - offset) // 4
        file.write(offset, FREE.to_bytes(4, "big") * count)


def new_footer(options: VpcCreateOptions) -> Footer:
    """The footer of such an image, whatever its size. Raises UsageError."""
    sectors = -(-options.size // SECTOR)
    fixed = options.subformat == "fixed"
    exact = options.force_size
    made, chs = rounded_up(sectors)
    if options.backing_file is not None:
        if fixed:
            raise UsageError("A fixed VHD image has no backing file", field="backing_file")
        # It is as large as its parent, whether a geometry can say so or not.
        exact |= made != sectors
    if exact:
        made, chs = sectors, LARGEST
    kind = layout.FIXED if fixed else layout.DYNAMIC
    return Footer(
        made * SECTOR,
        kind if options.backing_file is None else layout.DIFFERENCING,
        chs,
        data_offset=layout.NOWHERE if fixed else FOOTER_SIZE,
        timestamp=int(time.time()) - EPOCH,
        creator=EXACT if exact else b"qemu",
        unique_id=_new_id(),
    )


def new_header(footer: Footer) -> Header:
    """The dynamic header of an image without a parent."""
    blocks = -(-footer.current_size // layout.DEFAULT_BLOCK)
    return Header(FOOTER_SIZE + HEADER_SIZE, blocks)


def _with_parent(
    header: Header, options: VpcCreateOptions, context: CreateContext
) -> tuple[Header, bytes]:
    """The header with its locators, and what they point to, which comes in front of the table."""
    from lamina.formats.vpc.parent import describe, linkage

    parent = context.backing_node()
    if parent is None:
        raise UsageError(
            "A differencing VHD image cannot be created without opening its parent",
            field="backing_file",
        )
    assert options.backing_file is not None
    place = header.table_offset
    header, content = describe(
        header, linkage(parent), options.backing_file, context.filename, place
    )
    return replace(header, table_offset=place + len(content)), content


def _new_id() -> bytes:
    """A random UUID (version 4)."""
    value = bytearray(os.urandom(16))
    value[6] = value[6] & 0x0F | 0x40
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)


def file_size(options: VpcCreateOptions) -> int:
    """Bytes of the file of a new fixed image; others grow."""
    footer = new_footer(options)
    if footer.disk_type != layout.FIXED:
        return 0
    return footer.current_size + FOOTER_SIZE

