"""The footers of an open image: found, repaired, and kept behind the last block while it grows."""

from __future__ import annotations

from lamina.engine.metadata import DirtyWrite, Stage
from lamina.errors import ImageCorrupt
from lamina.formats.vpc.layout import (
    COOKIE,
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    FOOTER_SIZE,
    Footer,
    parse_footer,
)
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lamina.block.node import Node


def find_footer(file: Node) -> tuple[Footer, bool]:
    """The footer that is to be believed, and whether both copies say so.

    What ends the file decides if it is the footer of a fixed disk, for there the first sector is
    the guest's. Otherwise the copy at the beginning is good, and what ends the file helps where it
    is not. Raises ImageCorrupt.
    """
    last = _footer_at_end(file)
    if last is not None and last.disk_type == FIXED:
        return last, True
    head = file.read(0, min(FOOTER_SIZE, file.size))
    try:
        first = parse_footer(head)
    except ImageCorrupt:
        if last is None or last.disk_type not in (DYNAMIC, DIFFERENCING):
            raise
        return last, False
    return first, first == last


def _footer_at_end(file: Node) -> Footer | None:
    end = file.size
    if end < FOOTER_SIZE:
        return None
    tail = file.read(end - FOOTER_SIZE, FOOTER_SIZE)
    if not tail.startswith(COOKIE):
        return None
    try:
        return parse_footer(tail)
    except ImageCorrupt:
        return None


class TrailingFooter:
    """A source of the metadata: the footer, written where the file ends, before any BAT entry names
    the block in front of it."""

    name = "footer"

    def __init__(self, place: Callable[[], int], footer: Callable[[], Footer]) -> None:
        self._place = place
        self._footer = footer
        self._dirty = False
        self._unsettled = 0
        """The number of the last write that may not be durable; 0: none."""

    def touch(self) -> None:
        """The end has moved, or the footer says something else."""
        self._dirty = True

    @property
    def dirty_bytes(self) -> int:
        return FOOTER_SIZE if self._dirty else 0

    def collect(self, stage: Stage) -> list[DirtyWrite]:
        if stage is not Stage.TABLES or not self._dirty:
            return []
        return [DirtyWrite(self._place(), self._footer().pack(), "")]

    def written(self, stage: Stage, generation: int) -> None:
        self._dirty = False
        self._unsettled = generation

    def settled(self, generation: int) -> None:
        if generation >= self._unsettled:
            self._unsettled = 0

    def lost(self) -> None:
        self._dirty |= self._unsettled > 0
        self._unsettled = 0
