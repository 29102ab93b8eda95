"""Changing the size of the disk, and moving the BAT where it has to grow.

The size is written when everything that it makes visible is durable, or before what it hides goes.
"""

from __future__ import annotations

import struct

from lamina.block.extents import Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.errors import UsageError
from lamina.formats.vhdx.clearing import clear
from lamina.formats.vhdx.layout import (
    FULLY_PRESENT,
    NOT_PRESENT,
    REGION_TABLE_OFFSETS,
    ZERO,
    pack_regions,
)
from lamina.formats.vhdx.metadata import MAX_SIZE, VIRTUAL_DISK_SIZE
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import MIB, round_up

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping
    from lamina.formats.vhdx.metadata import Parameters

_STEP = 1 << 17
"""Blocks whose entries are changed before memory may be relieved."""


def resize(mapping: VhdxMapping, size: int, preallocation: Preallocation) -> None:
    """Make the disk ``size`` bytes long; what is new reads as zeroes, whatever the parent holds.

    Raises UsageError, StorageError.
    """
    sector = mapping.parameters.logical_sector
    if size % sector:
        raise UsageError(f"The new size must be a multiple of {sector}")
    if size > MAX_SIZE:
        raise UsageError("Image size too large; max of 64TB")
    parameters = replace(mapping.parameters, size=size)
    if size < mapping.size:
        if preallocation is not Preallocation.OFF:
            raise UsageError("Preallocation can't be used for shrinking an image")
        _shrink(mapping, parameters)
    elif size > mapping.size:
        _grow(mapping, parameters, preallocation)


def _grow(mapping: VhdxMapping, parameters: Parameters, preallocation: Preallocation) -> None:
    bat = mapping.bat
    needed = 8 * parameters.bat_entries
    if needed > bat.length:
        _move_bat(mapping, round_up(needed, MIB))
    first, end = bat.blocks, parameters.blocks
    _zero_tail(mapping, parameters.size)
    if mapping.stays_allocated or preallocation is not Preallocation.OFF:
        _allocate(mapping, first, end, preallocation)
    else:
        for block in range(first, end, _STEP):
            bat.fill(block, min(_STEP, end - block), ZERO)
            mapping.metadata.relieve()
    if mapping.differencing:
        # Entries that were not in use may say anything.
        for chunk in range(bat.chunks, -(-parameters.blocks // bat.ratio)):
            bat.set_bitmap(chunk, 0)
    _write_size(mapping, parameters)


def _write_size(mapping: VhdxMapping, parameters: Parameters) -> None:
    mapping.metadata.commit()
    mapping.patch(
        mapping.image.item_offset(VIRTUAL_DISK_SIZE), struct.pack("<Q", parameters.size)
    )
    mapping.parameters = parameters
    mapping.resized()
    mapping.metadata.commit()


def _zero_tail(mapping: VhdxMapping, size: int) -> None:
    """The rest of the last block becomes part of the disk: it may hold anything."""
    start = mapping.size
    end = min(round_up(start, mapping.unit), size)
    if start == end:
        return
    kinds = {extent.kind for extent in mapping.resolve(start, end - start)}
    if kinds == {Kind.ZERO} or (kinds == {Kind.BELOW} and not mapping.differencing):
        return
    reservation = mapping.reserve([(start, end - start)])
    try:
        for piece in reservation.pieces:
            length = piece.length + piece.copy_tail
            piece.node.write_zeroes(piece.host_offset, length, WriteFlags.MAY_UNMAP)
            mapping.metadata.data_written(piece.node)
    except BaseException:
        reservation.abort()
        raise
    reservation.commit()


def _allocate(
    mapping: VhdxMapping, first: int, end: int, preallocation: Preallocation
) -> None:
    """Places for blocks, one behind the other at the end of the file."""
    if first == end:
        return
    start = mapping.space.append((end - first) * mapping.unit, preallocation)
    for block in range(first, end):
        mapping.bat.set(block, start + (block - first) * mapping.unit | FULLY_PRESENT)
        if not block % _STEP:
            mapping.metadata.relieve()


def _shrink(mapping: VhdxMapping, parameters: Parameters) -> None:
    bat = mapping.bat
    first, end, chunks = parameters.blocks, bat.blocks, bat.chunks
    _write_size(mapping, parameters)
    for block in range(first, end, _STEP):
        clear(mapping, block, min(_STEP, end - block), even_absent=True, state=NOT_PRESENT)
        mapping.metadata.relieve()
    # No block may be without the bitmap that it needs, not even in a part of a commit.
    mapping.metadata.commit()
    if mapping.differencing:
        mapping.space.free_later(mapping.bitmaps.drop(range(bat.chunks, chunks)))
    mapping.metadata.commit()
    mapping.metadata.barrier()
    cut_tail(mapping)


def cut_tail(mapping: VhdxMapping) -> None:
    """Let the file end with the last megabyte in use.

    What the log says about the length of the file must not be held against the shorter one.
    """
    end = mapping.space.end
    if end >= mapping.file.size:
        return
    mapping.end_log()
    mapping.file.truncate(end)
    mapping.file.flush()
    mapping.grown()
    mapping.space.cut(end)
    mapping.begin(data=False)


def _move_bat(mapping: VhdxMapping, length: int) -> None:
    """A longer BAT elsewhere; the region tables name it once it is there as a whole."""
    bat, image, metadata = mapping.bat, mapping.image, mapping.metadata
    old = image.bat
    metadata.commit()
    metadata.barrier()
    bat.tables.drop_clean()
    place = mapping.space.allocate(length)
    try:
        for start in range(0, old.length, MIB):
            mapping.file.write(place + start, mapping.file.read(old.offset + start, MIB))
    except BaseException:
        mapping.space.give_back(place, length)
        raise
    metadata.data_written(mapping.file)
    image.regions = [
        replace(region, offset=place, length=length) if region.guid == old.guid else region
        for region in image.regions
    ]
    table = pack_regions(image.regions)
    for offset in REGION_TABLE_OFFSETS:
        mapping.patch(offset, table)
    bat.offset, bat.length = place, length
    mapping.regions_moved()
    metadata.commit()
    mapping.space.free_later([(old.offset, old.length)])
