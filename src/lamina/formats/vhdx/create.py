"""A new image: headers, log, BAT and metadata, one behind the other as QEMU lays them out.

The file identifier is written last: a file without it is no image yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from lamina.errors import UsageError
from lamina.formats.vhdx import locator
from lamina.formats.vhdx.layout import (
    BAT_REGION,
    FULLY_PRESENT,
    HEADER_OFFSETS,
    HEADER_SECTION,
    METADATA_REGION,
    NO_GUID,
    NOT_PRESENT,
    REGION_TABLE_OFFSETS,
    ZERO,
    Header,
    Region,
    file_identifier,
    new_guid,
    pack_regions,
)
from lamina.formats.vhdx.metadata import (
    IS_REQUIRED,
    MAX_BLOCK,
    MAX_SIZE,
    METADATA_BYTES,
    METADATA_TABLE_BYTES,
    PARENT_LOCATOR,
    SECTORS,
    Item,
    Parameters,
    pack_items,
)
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import GIB, MIB, TIB, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.vhdx.options import VhdxCreateOptions

PAYLOAD_GAP = 4 * MIB
"""Bytes that QEMU leaves between the metadata and the first block."""
_DIFFERENCING_BLOCK = 2 * MIB
_STEP = 1 << 17
"""BAT entries that are made at a time."""


@dataclass(frozen=True)
class Plan:
    """Where everything will be."""

    parameters: Parameters
    log_length: int

    @property
    def bat_offset(self) -> int:
        return HEADER_SECTION + self.log_length

    @property
    def bat_length(self) -> int:
        return max(round_up(8 * self.parameters.bat_entries, MIB), MIB)

    @property
    def metadata_offset(self) -> int:
        return self.bat_offset + self.bat_length

    @property
    def payload_offset(self) -> int:
        return self.metadata_offset + METADATA_BYTES + PAYLOAD_GAP

    @property
    def file_size(self) -> int:
        """A fixed image holds all of its blocks."""
        blocks = self.parameters.blocks if self.parameters.leave_allocated else 0
        return self.payload_offset + blocks * self.parameters.block_size


def plan(
    options: VhdxCreateOptions, *, logical_sector: int = 512, disk_id: bytes = NO_GUID
) -> Plan:
    """Raises UsageError with what QEMU says of such options."""
    if options.size > MAX_SIZE:
        raise UsageError("Image size too large; max of 64TB", field="size")
    if options.log_size >= 4 * GIB:
        raise UsageError("Log size must be smaller than 4 GB", field="log_size")
    if options.logical_sector_size is not None:
        logical_sector = options.logical_sector_size
    if logical_sector not in SECTORS:
        raise UsageError("Logical sector size must be 512 or 4096", field="logical_sector_size")
    differencing = options.backing_file is not None
    if differencing and options.subformat == "fixed":
        raise UsageError("A fixed image has no backing file", field="subformat")
    parameters = Parameters(
        round_up(options.size, logical_sector),
        _block_size(options),
        leave_allocated=options.subformat == "fixed",
        has_parent=differencing,
        logical_sector=logical_sector,
        physical_sector=logical_sector,
        disk_id=disk_id,
    )
    log_length = max(round_up(options.log_size, MIB), MIB)
    if log_length >= 4 * GIB:
        raise UsageError("Log size must be smaller than 4 GB", field="log_size")
    return Plan(parameters, log_length)


def _block_size(options: VhdxCreateOptions) -> int:
    if options.block_size:
        size = min(round_up(options.block_size, MIB), MAX_BLOCK)
        if size & (size - 1):
            raise UsageError("Block size must be a power of two", field="block_size")
        return size
    if options.backing_file is not None:
        return _DIFFERENCING_BLOCK
    for limit, size in ((GIB, 8 * MIB), (100 * GIB, 16 * MIB), (32 * TIB, 32 * MIB)):
        if options.size <= limit:
            return size
    return 64 * MIB


def create(options: VhdxCreateOptions, file: Node, context: CreateContext) -> None:
    parent: dict[str, str] = {}
    layout = plan(options, disk_id=new_guid())
    if options.backing_file is not None:
        layout, parent = _below(options, context)
    file.truncate(layout.file_size)
    for offset, data in _structures(layout, parent):
        file.write(offset, data)
    for offset, data in _bat(layout, zero=options.block_state_zero):
        file.write(offset, data)
    file.write(0, file_identifier())
    file.flush()


def _below(options: VhdxCreateOptions, context: CreateContext) -> tuple[Plan, dict[str, str]]:
    """A plan, and the parent locator, for an image above another one.

    The parent is known by what it holds, so it must be there, whoever said that it need not.
    """
    from lamina.formats.vhdx.mapping import VhdxMapping

    assert options.backing_file is not None
    node = context.backing_node(needed=True)
    mapping = getattr(node.unfiltered, "mapping", None) if node is not None else None
    if options.backing_fmt not in (None, "vhdx") or not isinstance(mapping, VhdxMapping):
        raise UsageError(
            "The backing file of a vhdx image must be one as well", field="backing_file"
        )
    guid = mapping.headers.current.data_write_guid
    below = mapping.parameters
    layout = plan(options, logical_sector=below.logical_sector, disk_id=below.disk_id)
    if layout.parameters.logical_sector != below.logical_sector:
        raise UsageError(
            "The sectors of a vhdx image must be as large as those of its parent",
            field="logical_sector_size",
        )
    return layout, locator.for_parent(options.backing_file, guid)


def _structures(layout: Plan, parent: dict[str, str]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of everything but the file identifier and the BAT."""
    sequence = int.from_bytes(new_guid()[:3], "little")
    guids = new_guid(), new_guid()
    for number, offset in enumerate(HEADER_OFFSETS):
        header = Header(sequence + number, *guids, NO_GUID, HEADER_SECTION, layout.log_length)
        yield offset, header.pack()
    regions = [
        Region(BAT_REGION, layout.bat_offset, layout.bat_length),
        Region(METADATA_REGION, layout.metadata_offset, METADATA_BYTES),
    ]
    for offset in REGION_TABLE_OFFSETS:
        yield offset, pack_regions(regions)
    content = layout.parameters.pack()
    if parent:
        content.append((PARENT_LOCATOR, IS_REQUIRED, locator.pack(parent)))
    items, at = [], METADATA_TABLE_BYTES
    for name, flags, data in content:
        items.append(Item(name, at, len(data), flags))
        yield layout.metadata_offset + at, data
        at += len(data)
    yield layout.metadata_offset, pack_items(items)


def _bat(layout: Plan, *, zero: bool) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the entries that are not all zeroes."""
    parameters = layout.parameters
    state = ZERO if zero and not parameters.has_parent else NOT_PRESENT
    if not (state or parameters.leave_allocated):
        return
    ratio, unit = parameters.chunk_ratio, parameters.block_size
    for first in range(0, parameters.bat_entries, _STEP):
        count = min(_STEP, parameters.bat_entries - first)
        entries = array("Q", [state]) * count
        if parameters.leave_allocated:
            block = first - first // (ratio + 1)
            start = layout.payload_offset | FULLY_PRESENT
            for number in range(count):
                if (first + number) % (ratio + 1) != ratio:
                    entries[number] = start + block * unit
                    block += 1
        for index in range(first + (ratio - first) % (ratio + 1), first + count, ratio + 1):
            entries[index - first] = 0
        yield layout.bat_offset + 8 * first, little_endian(entries)


def little_endian(entries: array[int]) -> bytes:
    import sys

    if sys.byteorder == "big":
        entries.byteswap()
    return entries.tobytes()
