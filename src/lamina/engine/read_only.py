"""What formats that are only ever read have in common."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata
from lamina.errors import Refused
from lamina.hints import TYPE_CHECKING, NoReturn
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.engine.disk import Disk

_STEP = 1 << 30


class ReadOnlyMapping(Mapping):
    """A mapping that writes nothing, whose disk therefore is never writable."""

    unit = SECTOR

    def __init__(self, disk: Disk) -> None:
        """Raises Refused if ``disk`` is to be writable and may not fall back to reading."""
        if not (disk.read_only or disk.options.auto_read_only):
            _refuse()
        disk.read_only = True
        self.disk = disk
        self.file: Node = disk.file
        self.metadata = Metadata(disk.file)

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        """In small pieces: what is encoded has an extent for every unit."""
        for start in range(offset, offset + length, _STEP):
            extents = self.resolve(start, min(_STEP, offset + length - start))
            yield Columns.from_extents(extents)

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        _refuse()

    def reopened(self, *, read_only: bool) -> None:
        if not read_only:
            _refuse()


def _refuse() -> NoReturn:
    raise Refused("Image is read-only", errno=errno.EACCES)
