"""Copying a window of a disk, every byte of it, zeroes included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.status import Status
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING
from lamina.jobs.convert import Conversion, Settings
from lamina.jobs.sources import Sources

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node, ReadRequest


class Window(Sources):
    """``length`` bytes of a disk from ``start`` on."""

    def __init__(self, disk: Backend, start: int, length: int) -> None:
        super().__init__([disk])
        self._start = start
        self._length = length

    @property
    def size(self) -> int:
        return self._length

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        super().readv([(offset + self._start, buffer) for offset, buffer in requests])

    def statuses(self, base: Node | None = None) -> Iterator[Status]:
        if self._length:
            yield Status(Extent(0, self._length, Kind.DATA), 0, False)


class _Copy(Conversion):
    def explained(self, error: LaminaError, doing: str, place: int) -> LaminaError:
        where = "from input" if doing == "reading" else "to output"
        return error.in_context(f"error while {doing} {where} image file: ")


def copy_window(disk: Backend, start: int, length: int, target: Backend) -> None:
    """Write ``length`` bytes of ``disk`` from ``start`` on to the beginning of ``target``."""
    settings = Settings(look_for_zeroes=False)
    _Copy(Window(disk, start, length), target, settings).run()
