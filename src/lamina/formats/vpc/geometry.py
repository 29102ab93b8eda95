"""Cylinders, heads and sectors: appendix "CHS Calculation", and which size a disk then has."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.formats.vpc.layout import Footer

Geometry = tuple[int, int, int]
"""Cylinders, heads, sectors per track."""
LARGEST: Geometry = (65535, 16, 255)
MAX_CHS_SECTORS = 65535 * 16 * 255

BY_GEOMETRY = (b"vpc ", b"qemu")
"""Creators whose disks are as large as their geometry says; all others say how large exactly."""
EXACT = b"qem2"
"""The creator of disks of ours and QEMU's that are exactly as large as they say."""


def geometry(sectors: int) -> Geometry:
    """Of a disk of so many sectors; it may have room for a few less."""
    sectors = min(sectors, MAX_CHS_SECTORS)
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        tracks = sectors // per_track
    else:
        per_track = 17
        tracks = sectors // per_track
        heads = max(-(-tracks // 1024), 4)
        if tracks >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            tracks = sectors // per_track
        if tracks >= heads * 1024:
            per_track, heads = 63, 16
            tracks = sectors // per_track
    return tracks // heads, heads, per_track


def rounded_up(sectors: int) -> tuple[int, Geometry]:
    """The next number of sectors that a geometry makes exactly, and that geometry; the number
    itself if none is so large."""
    if sectors > MAX_CHS_SECTORS:
        return sectors, LARGEST
    if not sectors:
        return 0, (0, 0, 0)
    tried = sectors
    while True:
        found = geometry(tried)
        made = found[0] * found[1] * found[2]
        if made >= sectors:
            return made, found
        tried += 1


def disk_size(footer: Footer, mode: str | None) -> int:
    """Guest bytes. ``mode``: "chs" or "current_size", None: what suits the creator."""
    if footer.geometry == LARGEST or mode == "current_size":
        return footer.current_size // SECTOR * SECTOR
    if mode == "chs" or footer.creator in BY_GEOMETRY:
        return footer.chs_size
    return footer.current_size // SECTOR * SECTOR
