"""Reading what can be read: sectors that cannot are zeroes, and a warning each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.status import Status, chain_extents
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING
from lamina.jobs.sources import Sources
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node, ReadRequest


class SalvagedSources(Sources):
    """A stretch that fails is halved until the sectors at fault are found."""

    def __init__(self, disks: Sequence[Backend], warn: Callable[[str], None]) -> None:
        super().__init__(disks)
        self._warn = warn

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            self._read(offset, buffer)

    def _read(self, offset: int, buffer: memoryview) -> None:
        try:
            super().readv([(offset, buffer)])
        except LaminaError as error:
            if len(buffer) <= SECTOR:
                self._warn(f"error while reading offset {offset}: {error}")
                buffer[:] = bytes(len(buffer))
                return
            half = _half(len(buffer))
            self._read(offset, buffer[:half])
            self._read(offset + half, buffer[half:])

    def status(
        self, node: Node, offset: int, length: int, base: Node | None
    ) -> Iterator[Status]:
        """Sectors that nobody can tell about count as data."""
        try:
            found = chain_extents(node, offset, length, base)
        except LaminaError as error:
            if length <= SECTOR:
                self._warn(f"error while reading block status at offset {offset}: {error}")
                yield Status(Extent(offset, length, Kind.DATA), 0, False)
                return
            half = _half(length)
            yield from self.status(node, offset, half, base)
            yield from self.status(node, offset + half, length - half, base)
        else:
            yield from found


def _half(length: int) -> int:
    return round_up(length // 2, SECTOR)
