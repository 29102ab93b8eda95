"""Sector bitmaps of differencing images [2.4]: bit 0 of byte 0 stands for the first sector.

A bit that is set says that the sector is in this file, otherwise it is in the parent. The bits of a
block count only while its entry says "partially present"; they may be stale before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lamina.engine.metadata import Stage
from lamina.engine.tables import TableCache
from lamina.formats.vhdx.layout import BITMAP_PRESENT, OFFSET, STATE
from lamina.formats.vhdx.metadata import BITMAP_BYTES
from lamina.hints import TYPE_CHECKING
from lamina.units import KIB, MIB

if TYPE_CHECKING:
    from lamina.engine.metadata import Metadata
    from lamina.formats.vhdx.bat import Bat
    from lamina.formats.vhdx.metadata import Parameters

TABLE_BYTES = 64 * KIB
CACHE_BYTES = 8 * MIB
_STEP = 64
"""Bytes of a bitmap that are looked at as one number."""


class Bitmaps:
    def __init__(self, metadata: Metadata, bat: Bat, parameters: Parameters) -> None:
        self._bat = bat
        self.sector = parameters.logical_sector
        self.bits = parameters.block_size // self.sector
        """Of a block."""
        self.tables = TableCache(
            metadata,
            table_bytes=TABLE_BYTES,
            capacity=CACHE_BYTES,
            stage=Stage.TABLES,
            name="sector bitmaps",
        )

    def host_offset(self, chunk: int) -> int:
        """Of the bitmap block of a chunk; 0: there is none."""
        entry = self._bat.bitmap(chunk)
        return entry & OFFSET if entry & STATE == BITMAP_PRESENT else 0

    def _parts(self, host: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(host offset of a table, first bit in it, bits) that hold these bits of a bitmap."""
        while count:
            table, bit = divmod(first, 8 * TABLE_BYTES)
            run = min(count, 8 * TABLE_BYTES - bit)
            yield host + table * TABLE_BYTES, bit, run
            first += run
            count -= run

    def hold(self, host: int, first: int, count: int) -> None:
        """See to it that the file has room for these bits of the bitmap block at ``host``."""
        for offset, start, run in self._parts(host, first, count):
            head, tail = start // 8, -(-(start + run) // 8)
            self.tables.hold(offset, head, tail - head)

    def fill(self, host: int, first: int, count: int, present: bool) -> None:
        """Change bits ``first``… of the bitmap block at ``host``."""
        for offset, start, run in self._parts(host, first, count):
            table = self.tables.get(offset)
            end = start + run
            head, tail = start // 8, -(-end // 8)
            mask = (1 << run) - 1 << start % 8
            old = int.from_bytes(table[head:tail], "little")
            new = old | mask if present else old & ~mask
            table[head:tail] = new.to_bytes(tail - head, "little")
            self.tables.dirty(offset, head, tail - head)

    def drop(self, chunks: Iterable[int]) -> list[tuple[int, int]]:
        """No block of these chunks needs its bitmap any more. (host offset, length) of those that
        were there."""
        dropped = []
        for chunk in chunks:
            place = self.host_offset(chunk)
            if place:
                self._bat.set_bitmap(chunk, 0)
                self.forget(place)
                dropped.append((place, BITMAP_BYTES))
        return dropped

    def forget(self, host: int) -> None:
        """There is another bitmap block at ``host``, or none."""
        for offset in range(host, host + BITMAP_BYTES, TABLE_BYTES):
            self.tables.drop(offset)

    def runs(self, host: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """(first bit, bits, whether they are set) of the runs of these bits."""
        begin, state = first, None
        at = first
        for offset, start, length in self._parts(host, first, count):
            table = self.tables.get(offset)
            for bit, present in _changes(table, start, length):
                if present != state:
                    if state is not None:
                        yield begin, at + bit - start - begin, state
                    begin, state = at + bit - start, present
            at += length
        if state is not None:
            yield begin, first + count - begin, state


def _changes(table: bytearray, first: int, count: int) -> Iterator[tuple[int, bool]]:
    """Where runs of equal bits begin, and what they are; some runs may be told in parts."""
    end = first + count
    while first < end:
        start = first // 8
        stop = min(start + _STEP, -(-end // 8))
        last = min(8 * stop, end)
        number = int.from_bytes(table[start:stop], "little") >> first % 8
        bit = first
        while bit < last:
            present = bool(number & 1)
            yield bit, present
            flipped = ~number if present else number
            run = (flipped & -flipped).bit_length() - 1 if flipped else last - bit
            bit += run
            number >>= run
        first = last
