"""How large a new image would be: header, tables and the clusters of its data."""

from __future__ import annotations

from lamina.block.driver import Measurement
from lamina.block.occupancy import data_units
from lamina.formats.qed.create import new_header
from lamina.hints import TYPE_CHECKING
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qed.options import QedCreateOptions


def measure(options: QedCreateOptions, source: Node | None) -> Measurement:
    """Raises UsageError for what cannot be created."""
    if source is not None:
        options = replace(options, size=source.size)
    header, _ = new_header(options)
    unit, table = header.cluster_size, header.table_bytes
    per_table = header.table_entries * unit
    empty = header.l1_table_offset + table
    size = header.image_size
    full = empty + -(-size // per_table) * table + -(-size // unit) * unit
    if source is None:
        return Measurement(empty, full)
    if options.backing_file is not None:
        # Nobody knows what of it the backing file holds already.
        return Measurement(full, full)
    held = data_units(source, per_table) * table + data_units(source, unit) * unit
    return Measurement(empty + held, full)
