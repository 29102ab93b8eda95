"""Changing the size of a VHD disk. It is exact from then on: sizes of geometries have gaps."""

from __future__ import annotations

import sys

from lamina.block.limits import Preallocation
from lamina.errors import ImageUnsupported, UsageError
from lamina.formats.vpc import layout
from lamina.formats.vpc.create import write_free
from lamina.formats.vpc.geometry import BY_GEOMETRY, EXACT, LARGEST, geometry
from lamina.formats.vpc.layout import FOOTER_SIZE, FREE, Footer
from lamina.formats.vpc.mapping import DynamicMapping, FixedMapping, VpcMapping
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node


def resize(mapping: VpcMapping, size: int, preallocation: Preallocation) -> None:
    """Raises UsageError, ImageUnsupported or StorageError, with the disk as it was."""
    if size % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}", field="size")
    layout.check_size(size)
    footer = _of_size(mapping.footer, size)
    if isinstance(mapping, FixedMapping):
        if preallocation is Preallocation.METADATA:
            raise ImageUnsupported("Unsupported preallocation mode 'metadata'")
        _resize_fixed(mapping.file, mapping.size, size, footer, preallocation)
    else:
        assert isinstance(mapping, DynamicMapping)
        if preallocation is not Preallocation.OFF:
            raise ImageUnsupported(f"Unsupported preallocation mode '{preallocation.value}'")
        if size > mapping.size:
            _prepare_to_grow(mapping, -(-size // mapping.unit))
        mapping.publish(footer)
        if size < mapping.size:
            _drop_blocks(mapping, -(-size // mapping.unit))
    mapping.footer, mapping.size = footer, size


def _of_size(footer: Footer, size: int) -> Footer:
    """The footer of a disk of exactly this size."""
    chs = geometry(size // SECTOR)
    footer = replace(footer, current_size=size, geometry=chs)
    if footer.creator in BY_GEOMETRY and footer.chs_size != size:
        footer = replace(footer, creator=EXACT, geometry=LARGEST)
    return footer


def _resize_fixed(
    file: Node, old_size: int, size: int, footer: Footer, preallocation: Preallocation
) -> None:
    """The new footer first, with one write that makes the file longer: the file ends with a footer
    all the time. The old one, which is data now, is zeroed when that is durable."""
    if size < old_size:
        file.write(size, footer.pack())
        file.flush()
        file.truncate(size + FOOTER_SIZE, exact=False)
        return
    end = file.size
    file.write(size, footer.pack())
    file.flush()
    file.truncate(size + FOOTER_SIZE, exact=False)
    # What lay between the disk and the end of the file was part of neither.
    file.write_zeroes(old_size, min(size, end) - old_size)
    if preallocation is not Preallocation.OFF:
        file.write_zeroes(old_size, size - old_size)


def _prepare_to_grow(mapping: DynamicMapping, blocks: int) -> None:
    """A table with room for so many blocks, which are not there."""
    table, header = mapping.table, mapping.header
    for block in range(-(-mapping.size // mapping.unit), min(blocks, header.max_table_entries)):
        if table[block] != FREE:
            table[block] = FREE
    if blocks <= header.max_table_entries:
        return
    metadata, file = mapping.metadata, mapping.file
    metadata.commit()
    length = round_up(4 * blocks, SECTOR)
    place, _ = mapping.appender.take(length, SECTOR)
    mapping.appender.reach(mapping.appender.end)
    write_free(file, place, place + length)
    for first, entries in table.runs(0, header.max_table_entries):
        if sys.byteorder == "little":
            entries.byteswap()
        file.write(place + 4 * first, entries.tobytes())
    mapping.trailer.touch()
    metadata.data_written(file)
    metadata.commit()
    metadata.barrier()
    # One sector holds all of the header that changes: the old table or the new one is in effect.
    changed = replace(header, table_offset=place, max_table_entries=blocks)
    file.write(mapping.footer.data_offset, changed.pack())
    file.flush()
    mapping.use_header(changed)


def _drop_blocks(mapping: DynamicMapping, first: int) -> None:
    """What lies behind the end of the disk must not come back when it grows. Blocks that end the
    file go with it; others leave gaps, which nothing counts."""
    for index, entries in mapping.table.runs(first, mapping.header.max_table_entries - first):
        for block, entry in enumerate(entries, index):
            if entry != FREE:
                mapping.table[block] = FREE
    metadata = mapping.metadata
    metadata.commit()
    metadata.barrier()
    mapping.disk.drain_reads()
    mapping.appender.end = mapping.find_end()
    mapping.trailer.touch()
    metadata.commit()
    metadata.barrier()
    mapping.appender.trim(keep=FOOTER_SIZE)
