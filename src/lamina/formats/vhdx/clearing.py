"""Whole blocks that read as zeroes from now on: by the state ZERO, their space given back."""

from __future__ import annotations

from lamina.formats.vhdx.layout import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, STATE, ZERO
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping


def clear(
    mapping: VhdxMapping, first: int, count: int, *, even_absent: bool, state: int = ZERO
) -> None:
    """Give blocks another state without data.

    ``even_absent``: those that are not there at all as well; otherwise they stay so.
    """
    freed: list[tuple[int, int]] = []
    try:
        for block, entries in mapping.bat.entries(first, count):
            for number, entry in enumerate(entries, block):
                old = entry & STATE
                if old in (FULLY_PRESENT, PARTIALLY_PRESENT):
                    freed.append((mapping.host_offset(number, entry), mapping.unit))
                elif entry == state or (old == NOT_PRESENT and not even_absent):
                    continue
                elif not entry:
                    mapping.bat.hold(number)
                mapping.bat.set(number, state)
    finally:
        mapping.space.free_later(freed)
