"""Several disks one behind the other, as one range of bytes to read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from lamina.block.status import Status, chain_extents
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node, ReadRequest

_LOOK_AHEAD = 1 << 30
"""Bytes whose extents are asked for at once, to begin with."""
_FEW = 1024
"""Where there is less than this to say, more can be asked for."""


class Sources:
    def __init__(self, disks: Sequence[Backend]) -> None:
        self.disks = list(disks)
        self.starts = [0]
        """Where each disk begins, and where the last one ends."""
        for disk in disks:
            self.starts.append(self.starts[-1] + disk.size)

    @property
    def size(self) -> int:
        return self.starts[-1]

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        if len(self.disks) == 1:
            self.disks[0].readv(requests)
            return
        for offset, buffer in requests:
            while len(buffer):
                number = bisect_right(self.starts, offset) - 1
                take = min(len(buffer), self.starts[number + 1] - offset)
                self.disks[number].readv([(offset - self.starts[number], buffer[:take])])
                offset, buffer = offset + take, buffer[take:]

    def statuses(self, base: Node | None = None) -> Iterator[Status]:
        """Of everything, in order, down to ``base`` as in ``chain_extents``.

        The extents' ``guest_offset`` counts from the first disk.
        """
        for start, disk in zip(self.starts, self.disks, strict=False):
            offset, step = 0, _LOOK_AHEAD
            while offset < disk.size:
                length = min(step, disk.size - offset)
                found = self.status(disk.node, offset, length, base)
                count = 0
                for status in found:
                    count += 1
                    extent = status.extent
                    if start:
                        extent = extent._replace(guest_offset=extent.guest_offset + start)
                        status = status._replace(extent=extent)
                    yield status
                offset += length
                step = step * 2 if count < _FEW else _LOOK_AHEAD

    def status(
        self, node: Node, offset: int, length: int, base: Node | None
    ) -> Sequence[Status] | Iterator[Status]:
        """What ``statuses`` asks, once for each stretch."""
        return chain_extents(node, offset, length, base)


def side_by_side(
    one: Iterator[Status], other: Iterator[Status], size: int
) -> Iterator[tuple[int, int, Status | None, Status | None]]:
    """(start, end, status of each) of ranges on which both are of one kind, up to ``size``.

    None: that side has ended.
    """
    sides = (one, other)
    now = [next(one, None), next(other, None)]
    offset = 0
    while offset < size:
        end = min((status.extent.end for status in now if status is not None), default=size)
        end = min(end, size)
        yield offset, end, now[0], now[1]
        offset = end
        for number, status in enumerate(now):
            if status is not None and status.extent.end == end:
                now[number] = next(sides[number], None)
