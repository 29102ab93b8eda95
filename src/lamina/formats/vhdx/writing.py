"""Places for writes, and what the tables say once the data is there."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.engine.mapping import Piece, Reservation
from lamina.formats.vhdx.layout import (
    BITMAP_PRESENT,
    FULLY_PRESENT,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    RESERVED,
    STATE,
)
from lamina.hints import TYPE_CHECKING
from lamina.units import MIB, round_down, round_up

if TYPE_CHECKING:
    from lamina.formats.vhdx.mapping import VhdxMapping


class VhdxReservation(Reservation):
    """Blocks that no table names yet, and sectors that their bitmap does not.

    A write to a block that is not in a differencing image brings over no more than the rest of its
    first and last sector: the block becomes partially present.
    """

    def __init__(self, mapping: VhdxMapping, ranges: Sequence[tuple[int, int]]) -> None:
        self._mapping = mapping
        self.pieces: list[Piece] = []
        self._blocks: list[tuple[int, int]] = []
        """(block, new entry)."""
        self._sectors: list[tuple[int, int, int]] = []
        """(block, first sector in it, sectors) that will be here."""
        try:
            for offset, length in ranges:
                self._reserve(offset, offset + length)
        except BaseException:
            self.abort()
            raise

    def _reserve(self, offset: int, end: int) -> None:
        mapping = self._mapping
        unit = mapping.unit
        first = offset // unit
        for block, entries in mapping.bat.entries(first, -(-end // unit) - first):
            for number, entry in enumerate(entries, block):
                start = max(number * unit, offset)
                stop = min((number + 1) * unit, end)
                state = entry & STATE
                if state == FULLY_PRESENT:
                    host = mapping.host_offset(number, entry) - number * unit
                    self.pieces.append(Piece(start, stop - start, mapping.file, host + start))
                elif state in (RESERVED, PARTIALLY_PRESENT):
                    self._complete(number, entry, start, stop)
                elif state == NOT_PRESENT and mapping.differencing:
                    self._new_sectors(number, start, stop)
                else:
                    self._new_block(number, start, stop)

    def _new_block(self, block: int, start: int, stop: int) -> None:
        """All of it will be here; what the write leaves out read as zeroes before."""
        mapping = self._mapping
        base = block * mapping.unit
        mapping.bat.hold(block)
        host = mapping.space.allocate(mapping.unit)
        self._blocks.append((block, host | FULLY_PRESENT))
        self.pieces.append(
            Piece(
                start,
                stop - start,
                mapping.file,
                host + start - base,
                copy_head=start - base,
                copy_tail=base + mapping.unit - stop,
                fresh=True,
                reads_zero=True,
            )
        )

    def _new_sectors(self, block: int, start: int, stop: int) -> None:
        """The first sectors of a block of a differencing image."""
        mapping = self._mapping
        base = block * mapping.unit
        last = min(base + mapping.unit, round_up(mapping.size, mapping.bitmaps.sector))
        mapping.bat.hold(block)
        host = mapping.space.allocate(mapping.unit)
        whole = start == base and stop >= last
        self._blocks.append((block, host | (FULLY_PRESENT if whole else PARTIALLY_PRESENT)))
        self._add_sectors(block, host, start, stop, zero=True)
        if whole:
            self._sectors.pop()
            return
        self._need_bitmap(block)

    def _need_bitmap(self, block: int) -> None:
        """A bitmap block is named before any entry makes it count, even where a commit that takes
        several entries of the log is cut off in between."""
        mapping = self._mapping
        chunk = block // mapping.bat.ratio
        if not mapping.bitmaps.host_offset(chunk):
            mapping.bat.hold_bitmap(chunk)
            place = mapping.space.allocate(MIB)
            mapping.bitmaps.forget(place)
            mapping.bat.set_bitmap(chunk, place | BITMAP_PRESENT)
            mapping.metadata.commit()
        self._hold(block, 0, mapping.bitmaps.bits)

    def _hold(self, block: int, first: int, count: int) -> None:
        """Have room for bits of a partially present block."""
        mapping = self._mapping
        mapping.bitmaps.hold(*self._bits(block, first), count)

    def _complete(self, block: int, entry: int, start: int, stop: int) -> None:
        """More sectors of a block, or others once more."""
        mapping = self._mapping
        host = mapping.host_offset(block, entry)
        base = block * mapping.unit
        for begin, end, present in list(mapping.sectors(block, start, stop)):
            if present:
                place = host + begin - base
                self.pieces.append(Piece(begin, end - begin, mapping.file, place))
            else:
                self._add_sectors(block, host, begin, end)
                self._hold(*self._sectors[-1])

    def _add_sectors(
        self, block: int, host: int, start: int, stop: int, *, zero: bool = False
    ) -> None:
        mapping = self._mapping
        sector = mapping.bitmaps.sector
        base = block * mapping.unit
        head, tail = round_down(start, sector), round_up(stop, sector)
        self._sectors.append((block, (head - base) // sector, (tail - head) // sector))
        self.pieces.append(
            Piece(
                start,
                stop - start,
                mapping.file,
                host + start - base,
                copy_head=start - head,
                copy_tail=tail - stop,
                fresh=True,
                reads_zero=zero,
            )
        )

    def commit(self) -> None:
        try:
            self._publish()
        except BaseException:
            self.abort()
            raise

    def _publish(self) -> None:
        mapping = self._mapping
        bitmaps = mapping.bitmaps
        for block, entry in self._blocks:
            if entry & STATE == PARTIALLY_PRESENT:
                # Whatever earlier uses of these bits have left.
                self._fill(block, 0, bitmaps.bits, False)
        for block, first, count in self._sectors:
            self._fill(block, first, count, True)
        while self._blocks:
            mapping.bat.set(*self._blocks[-1])
            del self._blocks[-1]

    def _fill(self, block: int, first: int, count: int, present: bool) -> None:
        self._mapping.bitmaps.fill(*self._bits(block, first), count, present)

    def _bits(self, block: int, first: int) -> tuple[int, int]:
        """Host offset of the bitmap block of a block, and which of its bits is ``first``."""
        mapping = self._mapping
        chunk, number = divmod(block, mapping.bat.ratio)
        return mapping.bitmap_place(chunk, block), number * mapping.bitmaps.bits + first

    def abort(self) -> None:
        space = self._mapping.space
        for _, entry in self._blocks:
            space.give_back(entry & ~STATE, self._mapping.unit)
        self._blocks = []
