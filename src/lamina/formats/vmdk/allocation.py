"""Space for grains: new ones at the end of the file, freed ones again; and what writes reserve."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import groupby

from lamina.engine.mapping import Piece, Reservation
from lamina.errors import StorageError
from lamina.formats.vmdk.layout import MAX_SECTOR
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.vmdk.sparse import SparseExtent


class Space:
    """The space of one extent's file. Nobody else knows what is free: nothing on disk says it."""

    def __init__(self, end: int, file_size: int) -> None:
        self.end = end
        """Where the next new space begins, before it is aligned."""
        self.touched = file_size
        """Nothing was ever written behind this: it reads as zeroes."""
        self._free: list[int] = []

    def append(self, length: int, alignment: int) -> int:
        """Host offset of new space. Raises StorageError (EFBIG)."""
        offset = round_up(self.end, alignment)
        if (offset + length) // SECTOR > MAX_SECTOR:
            raise StorageError.from_errno(errno.EFBIG)
        self.end = offset + length
        return offset

    def take(self, grain: int) -> tuple[int, bool]:
        """Host offset of a grain, and whether it reads as zeroes."""
        if self._free:
            return heappop(self._free), False
        offset = self.append(grain, grain)
        return offset, offset >= self.touched

    def give_back(self, offset: int, grain: int) -> None:
        """A grain that no table on storage names any more."""
        self.touched = max(self.touched, min(offset + grain, self.end))
        if offset + grain == self.end:
            self.end = offset
        else:
            heappush(self._free, offset)

    def cut(self, end: int) -> None:
        """The file ends here now."""
        self.end = self.touched = end
        self._free = [offset for offset in self._free if offset < end]
        heapify(self._free)


class VmdkReservation(Reservation):
    """Pieces in any extents, and the new grains among them, which no table names yet."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._new: list[tuple[SparseExtent, int, int]] = []
        """Extent, number of the grain, host offset."""

    def add(self, piece: Piece) -> None:
        """Joined to the last one where they adjoin on both sides."""
        if self.pieces:
            last = self.pieces[-1]
            if (
                last.guest_offset + last.length == piece.guest_offset
                and last.host_offset + last.length == piece.host_offset
                and last.node is piece.node
                and last.fresh == piece.fresh
                and last.reads_zero == piece.reads_zero
                and not (last.copy_tail or piece.copy_head)
            ):
                self.pieces[-1] = last._replace(
                    length=last.length + piece.length, copy_tail=piece.copy_tail
                )
                return
        self.pieces.append(piece)

    def took(self, extent: SparseExtent, number: int, host_offset: int) -> None:
        self._new.append((extent, number, host_offset))

    def commit(self) -> None:
        """All tables first: what could fail fails before anything is named."""
        for extent, grains in self._by_extent():
            extent.hold_tables([number for number, _ in grains])
        for extent, grains in self._by_extent():
            extent.publish(grains)

    def abort(self) -> None:
        for extent, grains in self._by_extent():
            extent.give_back(grains)

    def _by_extent(self) -> Iterator[tuple[SparseExtent, list[tuple[int, int]]]]:
        for _, group in groupby(self._new, key=lambda new: id(new[0])):
            found = list(group)
            yield found[0][0], [(number, host_offset) for _, number, host_offset in found]
