"""A differencing image that loses its parent: a dynamic one is left.

What the parent would have been asked for reads as zeroes from then on. Blocks that are partially
present become whole ones first; the metadata, which fits into one entry of the log, follows.
"""

from __future__ import annotations

import struct

from lamina.block.limits import WriteFlags
from lamina.formats.vhdx.layout import FULLY_PRESENT, PARTIALLY_PRESENT, STATE
from lamina.formats.vhdx.metadata import FILE_PARAMETERS, ITEM_BYTES, PARENT_LOCATOR
from lamina.formats.vhdx.parent import read_item_table
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping


def lose_parent(mapping: VhdxMapping) -> None:
    """Durable on return. Raises what the file raises, and ImageCorrupt for bad entries."""
    mapping.begin(data=False)
    bat = mapping.bat
    for first, entries in bat.entries(0, bat.blocks):
        for block, entry in enumerate(entries, first):
            if entry & STATE == PARTIALLY_PRESENT:
                _complete(mapping, block, entry)
        mapping.metadata.relieve()
    # A partially present block has its bitmap, whatever part of the next commit is lost.
    mapping.metadata.commit()
    mapping.space.free_later(mapping.bitmaps.drop(range(bat.chunks)))
    mapping.metadata.commit()
    _forget_parent(mapping)
    mapping.metadata.commit()
    mapping.metadata.barrier()


def _complete(mapping: VhdxMapping, block: int, entry: int) -> None:
    """The sectors that are missing are zeroes."""
    host = mapping.host_offset(block, entry)
    start = block * mapping.unit
    end = min(start + mapping.unit, round_up(mapping.size, mapping.bitmaps.sector))
    for begin, stop, present in mapping.sectors(block, start, end):
        if not present:
            mapping.file.write_zeroes(host + begin - start, stop - begin, WriteFlags.MAY_UNMAP)
    mapping.metadata.data_written(mapping.file)
    mapping.bat.set(block, host | FULLY_PRESENT)


def _forget_parent(mapping: VhdxMapping) -> None:
    """The flag and the locator go with the next commit, which holds nothing else."""
    image = mapping.image
    parameters = replace(mapping.parameters, has_parent=False)
    table, at = read_item_table(image, image.items[PARENT_LOCATOR])
    rest = table[at + ITEM_BYTES :] + bytes(ITEM_BYTES)
    base = image.metadata.offset
    mapping.patch(base + at, bytes(rest))
    mapping.patch(base + 10, struct.pack("<H", len(table) // ITEM_BYTES - 2))
    (content,) = (data for name, _, data in parameters.pack() if name == FILE_PARAMETERS)
    mapping.patch(image.item_offset(FILE_PARAMETERS), content)
    del image.items[PARENT_LOCATOR]
    image.parent, image.parent_name = {}, None
    image.parameters = mapping.parameters = parameters
    mapping.resized()
