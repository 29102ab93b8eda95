"""How large a new image would be."""

from __future__ import annotations

from lamina.block.driver import Measurement
from lamina.block.extents import Kind
from lamina.formats.vhdx.create import plan
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import MIB

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vhdx.options import VhdxCreateOptions


def measure(options: VhdxCreateOptions, source: Node | None) -> Measurement:
    """Bytes of an image with these options that holds ``source``, or nothing. Raises UsageError."""
    if source is not None:
        options = replace(options, size=source.size)
    layout = plan(options)
    parameters = layout.parameters
    full = layout.payload_offset + parameters.blocks * parameters.block_size
    if parameters.has_parent:
        full += -(-parameters.blocks // parameters.chunk_ratio) * MIB
    if parameters.leave_allocated or (source is not None and parameters.has_parent):
        # Of what is above a parent nobody knows what that holds already.
        return Measurement(full, full)
    held = 0 if source is None else _blocks_held(source, parameters.block_size)
    return Measurement(layout.payload_offset + held * parameters.block_size, full)


def _blocks_held(source: Node, unit: int) -> int:
    """Blocks of the new image that would hold something else than zeroes."""
    from lamina.block.status import chain_extents

    step = unit << 12
    blocks, last = 0, -1
    for start in range(0, source.size, step):
        for extent, _, zero in chain_extents(source, start, min(step, source.size - start)):
            if zero or extent.kind in (Kind.BELOW, Kind.ZERO):
                continue
            first = max(extent.guest_offset // unit, last + 1)
            last = (extent.end - 1) // unit
            blocks += last - first + 1
    return blocks
