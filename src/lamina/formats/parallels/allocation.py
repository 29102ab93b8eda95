"""Which clusters of the file are in use: what no entry of the BAT names is free."""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from lamina.block.limits import Preallocation
from lamina.engine.mapping import Piece, Reservation
from lamina.errors import LaminaError, StorageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.parallels.mapping import ParallelsMapping


class Clusters:
    """The free places of the data area. Under the disk's lock."""

    def __init__(
        self,
        file: Node,
        data_offset: int,
        cluster_size: int,
        used: Iterable[tuple[int, int]],
        limit: int,
    ) -> None:
        """``used``: (start, end) of the host bytes in use, ascending and apart, perhaps off the
        grid of clusters; ``limit``: no cluster begins behind this offset."""
        self.file = file
        self.cluster_size = cluster_size
        self.limit = limit
        self.end = data_offset
        """Everything from here to the end of the file is free."""
        self._touched = file.size
        """Nothing was ever written behind this: it reads as zeroes."""
        self._free: list[tuple[int, int]] = []
        """(start, end) of what is free before: whole clusters on the grid. A heap."""
        for start, end in used:
            whole = (start - self.end) // cluster_size * cluster_size
            if whole > 0:
                self._free.append((self.end, self.end + whole))
            self.end += -(-(end - self.end) // cluster_size) * cluster_size

    def take(self) -> int:
        """Host offset of a free cluster, the first there is. Raises StorageError (EFBIG)."""
        if self._free:
            start, end = self._free[0]
            if start + self.cluster_size < end:
                heapq.heapreplace(self._free, (start + self.cluster_size, end))
            else:
                heapq.heappop(self._free)
            return start
        if self.end > self.limit:
            raise StorageError.from_errno(errno.EFBIG)
        offset = self.end
        self.end += self.cluster_size
        return offset

    def give_back(self, offset: int) -> None:
        """Nobody can find this cluster any more, nor is anybody reading it."""
        # Something may have been written there.
        self._touched = max(self._touched, offset + self.cluster_size)
        heapq.heappush(self._free, (offset, offset + self.cluster_size))

    def reads_zero(self, offset: int) -> bool:
        """Whether a cluster that was just taken is known to."""
        return offset >= self._touched

    def shrink(self) -> None:
        """Let ``end`` be behind the last cluster that is in use."""
        for start, end in sorted(self._free, reverse=True):
            if end != self.end:
                break
            self.end = start
        self._free = [one for one in self._free if one[0] < self.end]
        heapq.heapify(self._free)


class Growth:
    """Making the file longer in large steps, so that its clusters come to lie together."""

    def __init__(self, file: Node, mode: Preallocation, size: int) -> None:
        self._file = file
        self._mode = mode
        self._size = size
        self.length = file.size
        """Of the file, in bytes."""

    def reach(self, end: int) -> None:
        """Have the file reach to ``end`` at least. Raises StorageError."""
        if end <= self.length:
            return
        try:
            self._file.truncate(end + self._size, self._mode, exact=False)
        except LaminaError:
            # There is no room for more than what is needed.
            self._file.truncate(end, exact=False)
        self.length = self._file.size


class ClusterReservation(Reservation):
    """Clusters that no entry names yet, and places that exist."""

    def __init__(self, mapping: ParallelsMapping, ranges: Sequence[tuple[int, int]]) -> None:
        """Raises StorageError with nothing reserved."""
        self.pieces: list[Piece] = []
        self._mapping = mapping
        self._new: list[tuple[int, int]] = []
        """Block and host offset."""
        try:
            for offset, length in ranges:
                self._add(offset, offset + length)
            if self._new:
                mapping.growth.reach(mapping.clusters.end)
        except BaseException:
            self.abort()
            raise

    def _add(self, offset: int, end: int) -> None:
        mapping = self._mapping
        unit = mapping.unit
        while offset < end:
            block, skip = divmod(offset, unit)
            stop = min(end, offset - skip + unit)
            place = mapping.place(block)
            fresh = place < 0
            if fresh:
                mapping.table.hold(block)
                place = mapping.clusters.take()
                self._new.append((block, place))
            self.pieces.append(
                Piece(
                    offset,
                    stop - offset,
                    mapping.file,
                    place + skip,
                    copy_head=skip if fresh else 0,
                    copy_tail=offset - skip + unit - stop if fresh else 0,
                    fresh=fresh,
                    reads_zero=fresh and mapping.clusters.reads_zero(place),
                )
            )
            offset = stop

    def commit(self) -> None:
        mapping = self._mapping
        for block, place in self._new:
            mapping.table[block] = place // mapping.scale

    def abort(self) -> None:
        for _, place in self._new:
            self._mapping.clusters.give_back(place)


def freeing(mapping: ParallelsMapping, places: Sequence[int]) -> Callable[[], None]:
    """What to do once nobody can find the clusters at ``places``."""

    def free() -> None:
        for place in places:
            with suppress(LaminaError):
                mapping.file.discard(place, mapping.unit)
            mapping.clusters.give_back(place)

    return free
