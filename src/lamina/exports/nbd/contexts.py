"""Metadata contexts: what BLOCK_STATUS tells of a disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from lamina.block.extents import Kind
from lamina.block.status import chain_extents
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.units import round_down, round_up
from lamina.wire.nbd import constants as nbd

if TYPE_CHECKING:
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.node import Node

_FIRST_STEP = 64 << 20
_LONGEST_STEP = 1 << 40
_MOST = 16 << 10
"""Extents that are looked for before a reply is good enough."""


class Context(ABC):
    """``name`` and a value for every byte of the disk."""

    name: str

    @abstractmethod
    def values(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """Lengths in bytes and values, in order, without gaps."""

    def status(
        self, offset: int, length: int, *, only_one: bool, longest: int
    ) -> list[tuple[int, int]]:
        """Extents from ``offset`` on, at least one, neighbours of one value joined.

        They may end before ``length``: where there are many. None is longer than ``longest``.
        """
        found: list[tuple[int, int]] = []
        for part, value in self._in_steps(offset, length):
            while part:
                before, known = found[-1] if found else (0, -1)
                if known == value and before < longest:
                    taken = min(part, longest - before)
                    found[-1] = (before + taken, value)
                elif found and only_one:
                    return found
                else:
                    taken = min(part, longest)
                    found.append((taken, value))
                part -= taken
            if len(found) >= _MOST:
                break
        return found

    def _in_steps(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Large disks piece by piece: an answer may be enough before all of it is looked at."""
        end = offset + length
        step = _FIRST_STEP
        while offset < end:
            part = min(step, end - offset)
            yield from self.values(offset, part)
            offset += part
            step = min(step * 4, _LONGEST_STEP)


class AllocationContext(Context):
    """base:allocation, across the whole backing chain."""

    name = nbd.BASE_ALLOCATION

    def __init__(self, node: Node, block: int = 1) -> None:
        """``block``: bytes; a block that begins and ends differently is neither hole nor zero."""
        self._node = node
        self._block = block

    def values(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        found = self._values(offset, length)
        return found if self._block == 1 else _in_blocks(found, offset, self._block)

    def _values(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for extent, _, reads_zero in chain_extents(self._node, offset, length):
            is_data = extent.kind in (Kind.DATA, Kind.ENCODED, Kind.INLINE)
            value = 0 if is_data else nbd.STATE_HOLE
            yield extent.length, value | (nbd.STATE_ZERO if reads_zero else 0)


def _in_blocks(
    extents: Iterable[tuple[int, int]], offset: int, block: int
) -> Iterator[tuple[int, int]]:
    """The same, with all edges moved to edges of blocks; what is mixed keeps the bits that all of
    it has."""
    start = at = offset  # what lies between them has not been told yet
    mixed = -1
    for length, value in extents:
        end = at + length
        if at % block:
            mixed &= value
            edge = min(round_up(at, block), end)
            if edge % block:
                at = end
                continue
            yield edge - start, mixed
            start = edge
        at = end
        whole = round_down(end, block)
        if whole > start:
            yield whole - start, value
            start = whole
        mixed = value
    if at > start:
        yield at - start, mixed


class DepthContext(Context):
    """qemu:allocation-depth: which layer of the backing chain holds the bytes; 1 is the top."""

    name = "qemu:allocation-depth"

    def __init__(self, node: Node) -> None:
        self._node = node

    def values(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for extent, depth, _ in chain_extents(
            self._node, offset, length, look_for_holes=False
        ):
            yield extent.length, 0 if extent.kind == Kind.BELOW else depth + 1


class BitmapContext(Context):
    """qemu:dirty-bitmap:NAME, 1 where it is dirty."""

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self.name = f"qemu:dirty-bitmap:{bitmap.name}"
        self._bitmap = bitmap

    def values(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        at, end = offset, offset + length
        for start, dirty in self._bitmap.ranges(offset, length):
            if start > at:
                yield start - at, 0
            yield dirty, 1
            at = start + dirty
        if at < end:
            yield end - at, 0


def find_bitmap(node: Node, name: str, *, read_only: bool) -> DirtyBitmap:
    """A bitmap of a disk or of what is below it, fit to be shown. Raises UsageError."""
    layer: Node | None = node
    while layer is not None:
        for bitmap in layer.dirty_bitmaps:
            if bitmap.name == name:
                bitmap.check_usable()
                if read_only and not layer.read_only and bitmap.enabled:
                    raise UsageError(
                        f"Enabled bitmap '{name}' incompatible with readonly export"
                    )
                return bitmap
        layer = layer.file if layer.is_filter or layer.driver == "raw" else layer.backing
    raise UsageError(f"Bitmap '{name}' is not found")
