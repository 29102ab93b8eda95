"""The sector bitmaps in front of the data of blocks: a bit per sector, most significant first."""

from __future__ import annotations

from collections.abc import Iterator

from lamina.engine.metadata import Stage
from lamina.engine.tables import TableCache
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.engine.metadata import Metadata

CACHE_BYTES = 1 << 20


class Bitmaps:
    """Bitmaps are known by the host offset of their block."""

    def __init__(self, metadata: Metadata, length: int) -> None:
        """``length``: bytes of a bitmap; bits behind the last sector of a block mean nothing."""
        self._length = length
        self._cache = TableCache(
            metadata,
            table_bytes=length,
            capacity=max(CACHE_BYTES, 2 * length),
            stage=Stage.TABLES,
            name="sector bitmaps",
        )

    def _bits(self, block: int, first: int, end: int) -> int:
        """The bits from ``first`` to ``end`` as a number; the first one is its highest."""
        bitmap = self._cache.find(block)
        if bitmap is None:
            bitmap = self._cache.get(block)
        number = int.from_bytes(bitmap[first // 8 : -(-end // 8)], "big")
        return number >> (-end % 8) & ((1 << (end - first)) - 1)

    def all_set(self, block: int, first: int, end: int) -> bool:
        return self._bits(block, first, end) == (1 << (end - first)) - 1

    def runs(self, block: int, first: int, end: int) -> Iterator[tuple[int, bool]]:
        """(first sector, whether they are set) of runs that cover these sectors."""
        bits, left = self._bits(block, first, end), end - first
        while left:
            ones = bits >> (left - 1) == 1
            # The length of the run at the top: how long a number is without it.
            rest = (bits ^ ((1 << left) - 1) if ones else bits).bit_length()
            yield end - left, ones
            left = rest
            bits &= (1 << left) - 1

    def new(self, block: int, *, all_set: bool) -> None:
        """Of a block that was just appended. The whole bitmap is dirty."""
        content = bytearray(self._length)
        if all_set:
            content[:] = b"\xff" * self._length
        self._cache.new(block, content)

    def content(self, block: int) -> bytearray:
        """As it is by now."""
        return self._cache.get(block)

    def drop(self, block: int) -> None:
        """The block is not one after all."""
        self._cache.drop(block)

    def forget(self) -> None:
        """Blocks are no more, and nothing is dirty."""
        self._cache.drop_clean()

    def mark(self, block: int, first: int, end: int) -> None:
        """Set the bits from ``first`` to ``end``."""
        start, stop = first // 8, -(-end // 8)
        bitmap = self._cache.get(block)
        ones = ((1 << (end - first)) - 1) << (-end % 8)
        number = int.from_bytes(bitmap[start:stop], "big") | ones
        self._cache.update(block, start, number.to_bytes(stop - start, "big"))
