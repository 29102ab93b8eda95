"""A new VDI image, dynamic or static."""

from __future__ import annotations

import os

from lamina.block.driver import Measurement
from lamina.formats.vdi import layout
from lamina.formats.vdi.layout import BLOCK, Header
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vdi.options import VdiCreateOptions

_ENTRIES_AT_ONCE = 1 << 18


def create(options: VdiCreateOptions, file: Node) -> None:
    """Raises StorageError for a size that the format cannot have."""
    header = new_header(options)
    blocks = header.blocks_in_image
    file.truncate(0, exact=False)
    # The map first: a file without a header is no image yet.
    for first in range(0, blocks, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, blocks - first)
        entries = b"\xff" * (4 * count)
        if options.static:
            entries = b"".join(
                block.to_bytes(4, "little") for block in range(first, first + count)
            )
        file.write(header.offset_bmap + 4 * first, entries)
    file.truncate(header.offset_data + header.blocks_allocated * BLOCK, exact=False)
    file.flush()
    file.write(0, header.pack())


def new_header(options: VdiCreateOptions) -> Header:
    layout.check_size(options.size)
    size = round_up(options.size, SECTOR)
    blocks = -(-size // BLOCK)
    return Header(
        size,
        layout.SIZE + round_up(4 * blocks, SECTOR),
        blocks,
        blocks if options.static else 0,
        image_type=layout.STATIC if options.static else layout.DYNAMIC,
        uuid_image=new_uuid(),
        uuid_last_snapshot=new_uuid(),
    )


def new_uuid() -> bytes:
    """A random one (version 4), with its first three fields little-endian."""
    value = bytearray(os.urandom(16))
    value[7] = value[7] & 0x0F | 0x40
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)


def measure(options: VdiCreateOptions, source: Node | None) -> Measurement:
    """Bytes of an image with these options that holds ``source``, or nothing."""
    from lamina.block.occupancy import data_units
    from lamina.records import replace

    if source is not None:
        options = replace(options, size=source.size)
    header = new_header(options)
    full = header.offset_data + header.blocks_in_image * BLOCK
    required = header.offset_data
    if options.static:
        required = full
    elif source is not None:
        required += data_units(source, BLOCK) * BLOCK
    return Measurement(required, full)
