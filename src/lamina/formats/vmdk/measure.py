"""How large a new VMDK would be, with all of its files: by arithmetic, and by what it has to hold.
"""

from __future__ import annotations

from lamina.block.driver import Measurement
from lamina.block.occupancy import data_units
from lamina.formats.vmdk.create import (
    MAX_EXTENT,
    STREAM,
    check_options,
    sparse_header,
    stream_header,
)
from lamina.formats.vmdk.layout import ENTRY_SIZE, GRAIN, TABLE_ENTRIES
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vmdk.options import VmdkCreateOptions

_DESCRIPTOR = 4096
"""Bytes that a descriptor of its own is reckoned with, per 64 extents."""
_STORED_GRAIN = round_up(GRAIN + 64, SECTOR)
"""Bytes of a grain that does not shrink."""


def measure(options: VmdkCreateOptions, source: Node | None) -> Measurement:
    """Raises UsageError, StorageError. Compressed grains are reckoned as if they did not shrink."""
    subformat = check_options(options)
    size = round_up(options.size if source is None else source.size, SECTOR)
    split = subformat.startswith("twoGb")
    lengths = [size]
    if split:
        lengths = [min(MAX_EXTENT, size - start) for start in range(0, size, MAX_EXTENT)]
    outside = round_up(_DESCRIPTOR * len(lengths) // 64, _DESCRIPTOR) + _DESCRIPTOR
    if subformat.endswith("Flat"):
        return Measurement(size + outside, size + outside)
    grains = -(-size // GRAIN)
    held = 0 if source is None else grains
    if source is not None and not options.backing_file:
        held = data_units(source, GRAIN)
    if subformat == STREAM:
        header = stream_header(size)
        directory = header.overhead + 4 * SECTOR + header.directory_entries * ENTRY_SIZE
        table = SECTOR + TABLE_ENTRIES * ENTRY_SIZE
        tables = -(-grains // TABLE_ENTRIES)
        return Measurement(
            round_up(directory + min(held, tables) * table + held * _STORED_GRAIN, SECTOR),
            round_up(directory + tables * table + grains * _STORED_GRAIN, SECTOR),
        )
    metadata = sum(sparse_header(one, zeroed=options.zeroed_grain).overhead for one in lengths)
    if split:
        metadata += outside
    return Measurement(metadata + held * GRAIN, metadata + grains * GRAIN)
