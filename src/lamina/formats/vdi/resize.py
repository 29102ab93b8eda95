"""Changing the size of a VDI disk. The header is one sector: whatever it says changes at once."""

from __future__ import annotations

from lamina.block.limits import Preallocation
from lamina.engine.appending import copy_within
from lamina.engine.metadata import Stage
from lamina.errors import ImageUnsupported, UsageError
from lamina.formats.vdi import layout
from lamina.formats.vdi.compact import compact, settle, used
from lamina.formats.vdi.layout import BLOCK, FREE, Header
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.formats.vdi.mapping import VdiMapping


def resize(mapping: VdiMapping, size: int, preallocation: Preallocation) -> None:
    """Raises UsageError, ImageUnsupported or StorageError, with the disk as it was."""
    if preallocation not in (Preallocation.OFF, Preallocation.METADATA):
        raise ImageUnsupported(f"Unsupported preallocation mode '{preallocation.value}'")
    if size % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}", field="size")
    layout.check_size(size)
    header = mapping.header
    blocks = -(-size // BLOCK)
    if blocks < header.blocks_in_image:
        _publish(mapping, replace(header, disk_size=size, blocks_in_image=blocks))
        compact(mapping)
        return
    if header.offset_bmap + 4 * blocks > header.offset_data:
        _make_room(mapping, blocks)
    elif blocks > header.blocks_in_image:
        _write_free(mapping, header.offset_bmap, header.blocks_in_image, blocks)
    old_blocks = header.blocks_in_image
    _publish(mapping, replace(mapping.header, disk_size=size, blocks_in_image=blocks))
    if preallocation is Preallocation.METADATA or header.image_type == layout.STATIC:
        _allocate(mapping, old_blocks, blocks)


def _write_free(mapping: VdiMapping, offset_bmap: int, first: int, end: int) -> None:
    """Entries of a map behind those in use."""
    step = 1 << 18
    for start in range(first, end, step):
        count = min(step, end - start)
        mapping.file.write(offset_bmap + 4 * start, FREE.to_bytes(4, "little") * count)
    mapping.metadata.data_written(mapping.file)


def _publish(mapping: VdiMapping, header: Header) -> None:
    """Another header takes effect. Durable on return."""
    settle(mapping)
    mapping.file.write(0, header.pack())
    mapping.file.flush()
    mapping.use_header(header)


def _make_room(mapping: VdiMapping, blocks: int) -> None:
    """The map outgrows its place: the first blocks of the file move to the end, and a new map takes
    theirs. All other blocks stay, with smaller numbers, for the data now begins further behind."""
    header = mapping.header
    room = -(-4 * blocks // BLOCK)
    mapping.find_end()
    guest, places = used(mapping)
    low = places < room
    for block, place in zip(guest[low].tolist(), places[low].tolist(), strict=True):
        target, _ = mapping.appender.take(BLOCK)
        mapping.appender.reach(mapping.appender.end)
        copy_within(mapping.file, mapping.base + place * BLOCK, target, BLOCK)
        mapping.metadata.data_written(mapping.file)
        mapping.table[block] = (target - mapping.base) // BLOCK
        mapping.added(block, target)
        mapping.metadata.relieve()
    settle(mapping)
    offset_bmap = header.offset_data
    for first, entries in mapping.table.columns(0, header.blocks_in_image):
        there = entries < layout.ZERO
        entries[there] -= room
        mapping.file.write(offset_bmap + 4 * first, entries.astype("<u4").tobytes())
    _write_free(mapping, offset_bmap, header.blocks_in_image, blocks)
    _publish(
        mapping,
        replace(
            mapping.header,
            offset_bmap=offset_bmap,
            offset_data=header.offset_data + room * BLOCK,
            blocks_allocated=max(mapping.header.blocks_allocated - room, 0),
        ),
    )


def _allocate(mapping: VdiMapping, first: int, end: int) -> None:
    """Places for blocks that have none. What was never written reads as zeroes."""
    mapping.find_end()
    for block in range(first, end):
        place, untouched = mapping.appender.take(BLOCK)
        if not untouched:
            mapping.appender.reach(mapping.appender.end)
            mapping.file.write_zeroes(place, BLOCK)
        mapping.table[block] = (place - mapping.base) // BLOCK
    mapping.appender.reach(mapping.appender.end)
    mapping.metadata.data_written(mapping.file)
    mapping.set_allocated((mapping.appender.end - mapping.base) // BLOCK, Stage.COUNTS)
