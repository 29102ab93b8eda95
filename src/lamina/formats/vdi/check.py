"""Check and repair: every entry of the map names a block of its own, and the header counts them.

QEMU checks the same and repairs nothing.
"""

from __future__ import annotations

import numpy as np

from lamina.block.driver import CheckResult, Fix
from lamina.engine.appending import copy_within
from lamina.formats.vdi.compact import compact
from lamina.formats.vdi.layout import BLOCK, FREE
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lamina.formats.vdi.mapping import VdiMapping


def check(mapping: VdiMapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """A wrong count of blocks is an error, as for QEMU, but repairing leaks makes it right: the
    blocks that nobody names are filled with others, and the file is cut."""
    result = CheckResult()
    header, limit = mapping.header, mapping.limit
    taken = np.zeros(limit, dtype=bool)
    allocated = 0
    shared: list[tuple[int, int]] = []
    for first, entries in mapping.table.columns(0, header.blocks_in_image):
        here = np.flatnonzero(~np.isin(entries, list(mapping.special)))
        numbers = entries[here]
        large = numbers >= limit
        once = np.zeros(len(numbers), dtype=bool)
        once[np.unique(numbers, return_index=True)[1]] = True
        once[~large] &= ~taken[numbers[~large]]
        taken[numbers[~large]] = True
        allocated += int(np.count_nonzero(~large))
        for at in np.flatnonzero(large | ~once).tolist():
            block, number = first + int(here[at]), int(numbers[at])
            if large[at]:
                report(f"ERROR: block index {block} too large, is {number}")
                if fix.errors:
                    mapping.table[block] = FREE
            else:
                report(f"ERROR: block index {number} also used by {number}")
                shared.append((block, number))
            result.corruptions += 1
    if fix.errors:
        for block, number in shared:
            _part(mapping, block, number)
        result.corruptions_fixed, result.corruptions = result.corruptions, 0
    if allocated != header.blocks_allocated:
        report(
            f"ERROR: allocated blocks mismatch, is {allocated}, should be "
            f"{header.blocks_allocated}"
        )
        if (fix.leaks or fix.errors) and not result.corruptions:
            compact(mapping)
            result.corruptions_fixed += 1
        else:
            result.corruptions += 1
    elif result.corruptions_fixed:
        compact(mapping)
    return result


def _part(mapping: VdiMapping, block: int, number: int) -> None:
    """Nobody knows whose a block is that two entries name: each gets what is there."""
    mapping.find_end()
    place, _ = mapping.appender.take(BLOCK)
    mapping.appender.reach(mapping.appender.end)
    copy_within(mapping.file, mapping.base + number * BLOCK, place, BLOCK)
    mapping.metadata.data_written(mapping.file)
    mapping.table[block] = (place - mapping.base) // BLOCK
    mapping.added(block, place)
    mapping.metadata.relieve()
