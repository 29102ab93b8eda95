"""How large a new image would be: its data with a footer, or structures and the blocks in use."""

from __future__ import annotations

from lamina.block.driver import Measurement
from lamina.block.occupancy import data_units
from lamina.formats.vpc.create import file_size, new_footer, new_header
from lamina.formats.vpc.layout import FOOTER_SIZE, check_size
from lamina.hints import TYPE_CHECKING
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vpc.options import VpcCreateOptions


def measure(options: VpcCreateOptions, source: Node | None) -> Measurement:
    """Raises UsageError or StorageError for what cannot be created."""
    if source is not None:
        options = replace(options, size=source.size)
    footer = new_footer(options)
    check_size(footer.current_size)
    fixed = file_size(options)
    if fixed:
        return Measurement(fixed, fixed)
    header = new_header(footer)
    empty = header.table_end + FOOTER_SIZE
    block = header.bitmap_bytes + header.block_size
    full = empty + header.max_table_entries * block
    if options.backing_file is not None:
        # Nobody knows what of it the parent holds already.
        return Measurement(full if source is not None else empty, full)
    held = 0 if source is None else data_units(source, header.block_size)
    return Measurement(empty + held * block, full)
