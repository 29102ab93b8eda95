"""Tables made good again out of their copies, copies out of their tables; grains parted."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.vmdk.sparse import SparseExtent


def replace_table(extent: SparseExtent, number: int) -> None:
    """A new table in the place of one that cannot be, with what its copy holds."""
    copy = extent.copy_offset(number)
    content = bytearray(extent.copies.get(copy)) if copy else None
    place = extent.space.append(extent.header.table_bytes, extent.grain)
    extent.tables.new(place, content)
    extent.name_table(extent.header.directory_offset, number, place)


def renew_copy(extent: SparseExtent, number: int) -> None:
    """Let the redundant copy of a table, a new one if need be, say what the table says."""
    table = extent.tables.get(extent.table_offset(number))
    copy = extent.copy_offset(number)
    if copy:
        extent.copies.update(copy, 0, table)
    elif extent.has_redundant_directory:
        place = extent.space.append(extent.header.table_bytes, extent.grain)
        extent.copies.new(place, bytearray(table))
        extent.name_table(extent.header.redundant_offset, number, place)


def copy_grain(extent: SparseExtent, number: int, source: int) -> int:
    """A new place for a grain, with what is at ``source``: its host offset."""
    node, grain = extent.node, extent.grain
    place = extent.space.append(grain, grain)
    content = node.read(source, min(grain, node.size - source))
    node.write(place, content.ljust(grain, b"\0"))
    extent.metadata.data_written(node)
    extent.publish([(number, place)])
    return place
