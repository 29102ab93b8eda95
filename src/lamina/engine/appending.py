"""Space for formats that only ever append: everything new goes behind the end of the file.

The file is made as long as its places reach before anything names them, so that every place that a
table names lies in the file, whatever part of it was written.
"""

from __future__ import annotations

import errno

from lamina.errors import StorageError
from lamina.hints import TYPE_CHECKING
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.block.node import Node


def copy_within(file: Node, source: int, target: int, length: int) -> None:
    """Bytes of a file to another place in it, which does not overlap. Host offsets."""
    step = 1 << 20
    for done in range(0, length, step):
        part = min(step, length - done)
        file.write(target + done, file.read(source + done, part))


class Appender:
    """Where the next place begins. Under the disk's lock."""

    def __init__(self, file: Node, end: int, *, limit: int = (1 << 63) - 1) -> None:
        """``end``: host offset behind everything that is in use, whatever the file holds there;
        ``limit``: no place reaches further."""
        self.file = file
        self.end = end
        self.limit = limit
        self._touched = max(end, file.size)

    def take(self, length: int, alignment: int = 1, *, prefix: int = 0) -> tuple[int, bool]:
        """Host offset of a new place, and whether it reads as zeroes for certain from ``prefix``
        bytes on.

        ``reach`` its end before anything names it. Raises StorageError (EFBIG).
        """
        offset = round_up(self.end, alignment)
        end = offset + length
        if end > self.limit:
            raise StorageError.from_errno(errno.EFBIG)
        untouched = offset + prefix >= self._touched
        self.end = end
        self._touched = max(self._touched, end)
        return offset, untouched

    def reach(self, end: int) -> None:
        """Have the file hold all places up to ``end``, whatever was written. Raises StorageError.

        After writing, for then there is seldom anything to do. A file that is too short is made to
        hold what others are still writing to as well: they must not be cut off.
        """
        if self.file.size < end:
            self.file.truncate(self.end, exact=False)

    def give_back(self, start: int, end: int) -> None:
        """Places that nobody came to name. Used again if nothing was appended behind them."""
        if self.end == end:
            self.end = start

    def trim(self, keep: int = 0) -> None:
        """Cut off what lies ``keep`` bytes behind the end. Only while nobody writes."""
        if self.file.size > self.end + keep:
            self.file.truncate(self.end + keep, exact=False)
            self._touched = self.end + keep
