"""Changing the size of a disk. What the header says of it is in one sector, and changes at once.

A longer BAT may need the place of the first clusters: they move behind it, each of them durable
before its entry names the new place, and all entries before the header gives the BAT its length.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from lamina.block.limits import Preallocation
from lamina.engine.appending import copy_within
from lamina.errors import ImageUnsupported, LaminaError, UsageError
from lamina.formats.parallels.layout import MAX_ENTRIES, MAX_SECTORS
from lamina.formats.parallels.survey import runs
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.parallels.layout import Header
    from lamina.formats.parallels.mapping import ParallelsMapping
    from lamina.formats.parallels.survey import Survey


def resize(mapping: ParallelsMapping, size: int, preallocation: Preallocation) -> None:
    """What is new reads as zeroes, or as the backing file that the user gave.

    With the disk to itself. Raises UsageError, ImageUnsupported or StorageError, with the disk as
    it was.
    """
    if preallocation is not Preallocation.OFF:
        raise ImageUnsupported(f"Unsupported preallocation mode '{preallocation.value}'")
    check_size(mapping.header, size)
    mapping.settle()
    entries = -(-size // mapping.unit)
    header = replace(mapping.header, entries=entries, sectors=size // SECTOR)
    if size > mapping.size:
        _grow(mapping, header)
    else:
        _shrink(mapping, header)
    mapping.set_free_space(mapping.survey())
    mapping.trim()


def check_size(header: Header, size: int) -> None:
    """Raises UsageError for a size that no image of this kind can have."""
    if size % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}", field="size")
    if size // SECTOR > (MAX_SECTORS if header.by_cluster else 0xFFFFFFFF):
        raise UsageError("Image size is too large", field="size")
    if -(-size // header.cluster_size) > MAX_ENTRIES:
        raise UsageError("Image size is too large for this cluster size", field="size")


def _grow(mapping: ParallelsMapping, header: Header) -> None:
    first = -(-mapping.size // mapping.unit)
    places = _places(mapping, first)
    if places:
        # The BAT was longer than the disk: what it names there would come to light.
        for block in range(first, mapping.header.entries):
            mapping.table[block] = 0
            mapping.metadata.relieve()
        mapping.settle()
        _discard(mapping, places)
    _zero_tail(mapping, header.size)
    found = mapping.survey()
    data_offset = mapping.data_offset(found)
    if header.table_end > data_offset:
        # The grid of the clusters stays.
        data_offset += round_up(header.table_end - data_offset, mapping.unit)
        _make_room(mapping, found, data_offset)
    old_end = mapping.header.table_end
    if header.table_end > old_end:
        mapping.file.write_zeroes(old_end, header.table_end - old_end)
    mapping.metadata.data_written(mapping.file)
    mapping.metadata.barrier()
    mapping.publish(replace(header, data_start=data_offset // SECTOR))


def _shrink(mapping: ParallelsMapping, header: Header) -> None:
    places = _places(mapping, header.entries)
    # A header that has no word for it means the grid that is there now.
    data_offset = mapping.data_offset(mapping.survey())
    old_end = mapping.header.table_end
    mapping.publish(replace(header, data_start=data_offset // SECTOR))
    mapping.file.write_zeroes(header.table_end, old_end - header.table_end)
    _discard(mapping, places)


def _places(mapping: ParallelsMapping, first: int) -> list[int]:
    """Host offsets of the clusters that the BAT names from entry ``first`` on, ascending."""
    places = [np.zeros(0, dtype=np.int64)]
    for _, column in mapping.table.columns(first, mapping.header.entries - first):
        places.append(column[column != 0] * mapping.scale)
    found: list[int] = np.sort(np.concatenate(places)).tolist()
    return found


def _discard(mapping: ParallelsMapping, places: list[int]) -> None:
    """Nobody can find the clusters at ``places`` any more, nor is anybody reading them."""
    for start, end in runs(places, mapping.unit):
        with suppress(LaminaError):
            mapping.file.discard(start, end - start)


def _zero_tail(mapping: ParallelsMapping, size: int) -> None:
    """The rest of the last cluster becomes part of the disk: it may hold anything."""
    block, skip = divmod(mapping.size, mapping.unit)
    place = mapping.place(block) if skip else -1
    if place >= 0:
        length = min(mapping.unit - skip, size - mapping.size)
        mapping.file.write_zeroes(place + skip, length)


def _make_room(mapping: ParallelsMapping, found: Survey, end: int) -> None:
    """No cluster begins before the host offset ``end`` any more, and the file reaches so far.

    If it raises, the places before stay free without being used.
    """
    mapping.set_free_space(found, end)
    for index, column in mapping.table.columns(0, mapping.header.entries):
        low = np.flatnonzero((column != 0) & (column * mapping.scale < end))
        for number in low.tolist():
            target = mapping.clusters.take()
            try:
                mapping.growth.reach(target + mapping.unit)
                source = int(column[number]) * mapping.scale
                copy_within(mapping.file, source, target, mapping.unit)
            except LaminaError:
                mapping.clusters.give_back(target)
                raise
            mapping.metadata.data_written(mapping.file)
            mapping.table[index + number] = target // mapping.scale
            mapping.metadata.relieve()
    mapping.growth.reach(end)
    mapping.settle()
