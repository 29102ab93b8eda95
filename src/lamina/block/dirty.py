"""Dirty bitmaps: which parts of a disk were written to since somebody last asked.

A bitmap belongs to a node (``Node.track``), which marks in it whatever is written, zeroed or
discarded by way of that node. One bit stands for a granule of the disk. Formats that keep bitmaps
in their images hand them over here (``persistent``); block jobs and exports make their own.

Thread-safe. Marking is cheap, and cheaper where the granule is dirty already.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from lamina.block.bitset import Bitset
from lamina.errors import ImageCorrupt, UsageError

MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31

Load = Callable[[Bitset], None]
"""Puts what storage has into the empty set that it is given. May raise LaminaError."""


class DirtyBitmap:
    def __init__(
        self,
        name: str,
        size: int,
        granularity: int,
        *,
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        load: Load | None = None,
    ) -> None:
        """``size`` of the disk and ``granularity``, a power of two, are bytes.

        ``load`` is called when the bits are first looked at.
        """
        self.name = name
        self.size = size
        self.granularity = granularity
        self.enabled = enabled
        """It records."""
        self.persistent = persistent
        """It is kept in the image."""
        self.inconsistent = inconsistent
        """Storage has lost track of it: it can only be removed."""
        self._shift = granularity.bit_length() - 1
        self._bits = Bitset()
        self._load = load
        self._lock = threading.Lock()

    def check_usable(self) -> None:
        """Raises ImageCorrupt for an inconsistent bitmap."""
        if self.inconsistent:
            raise ImageCorrupt(
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                structure="dirty bitmap",
                errno=errno.EINVAL,
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )

    @property
    def _granules(self) -> int:
        return -(-self.size >> self._shift)

    @property
    def is_changed(self) -> bool:
        """Bits are not what storage has."""
        return bool(self._bits.changed)

    def not_stored(self, chunks: Iterable[int]) -> None:
        """Storage has not got these chunks of bits after all."""
        with self._lock:
            self._bits.changed.update(chunks)

    def load(self) -> None:
        """Have the bits in memory. Raises what reading them raises."""
        with self._lock:
            self._loaded()

    @contextmanager
    def bits(self) -> Iterator[Bitset]:
        """The bits themselves, while nobody else looks at them or changes them."""
        with self._lock:
            yield self._loaded()

    def _loaded(self) -> Bitset:
        if self._load is not None:
            bits = Bitset()
            self._load(bits)
            # Bits behind the end of the disk mean nothing.
            bits.discard_run(self._granules, 1 << 63)
            bits.changed.clear()
            # What was recorded before anybody looked is news to storage.
            bits.update(self._bits)
            self._bits, self._load = bits, None
        return self._bits

    # -- marking ---------------------------------------------------------------------------------

    def mark(self, spans: Iterable[tuple[int, int]]) -> None:
        """Record writes, given as (offset, length): every granule that one touches is dirty.

        Does nothing while the bitmap is not enabled.
        """
        if not self.enabled:
            return
        shift, size = self._shift, self.size
        with self._lock:
            bits = self._bits
            for offset, length in spans:
                end = offset + length
                if end > size:
                    # VM state lies behind the disk.
                    end = size
                if end <= offset:
                    continue
                first, last = offset >> shift, (end - 1) >> shift
                if first == last:
                    bits.add(first)
                else:
                    bits.add_run(first, last + 1)

    def set(self, offset: int, length: int) -> None:
        """Make every granule dirty that the range touches, enabled or not."""
        end = min(offset + length, self.size)
        with self.bits() as bits:
            if offset < end:
                bits.add_run(offset >> self._shift, ((end - 1) >> self._shift) + 1)

    def reset(self, offset: int, length: int) -> None:
        """Make every granule clean that lies wholly in the range."""
        first = (offset + self.granularity - 1) >> self._shift
        end = (offset + length) >> self._shift
        if offset + length >= self.size:
            end = self._granules
        with self.bits() as bits:
            if first < end:
                bits.discard_run(first, end)

    def clear(self) -> None:
        """Make the whole disk clean."""
        with self.bits() as bits:
            bits.clear()

    def merge(self, other: DirtyBitmap) -> None:
        """Make dirty what is dirty in ``other``. Raises UsageError if the sizes differ."""
        if other.size != self.size:
            raise UsageError(
                f"Bitmaps are of different sizes (destination size is {self.size}, source size is "
                f"{other.size}) and can't be merged"
            )
        if other is self:
            return
        with ExitStack() as stack:
            # Two that are merged into each other at once must not wait for each other.
            for one in sorted((self, other), key=id):
                stack.enter_context(one._lock)
            mine, theirs = self._loaded(), other._loaded()
            if other.granularity == self.granularity:
                mine.update(theirs)
                return
            up, down = other._shift, self._shift
            for first, end in theirs.runs(0, other._granules):
                low, high = (first << up) >> down, -(-(end << up) >> down)
                mine.add_run(low, min(high, self._granules))

    def resize(self, size: int) -> None:
        """The disk has another length; what is new of it is clean."""
        with self.bits() as bits:
            self.size = size
            bits.discard_run(self._granules, 1 << 63)

    # -- asking ----------------------------------------------------------------------------------

    def ranges(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of what is dirty, in order and without neighbours.

        Writes that happen meanwhile may or may not be seen.
        """
        end = self.size if length is None else min(offset + length, self.size)
        self.load()
        if offset >= end:
            return
        shift = self._shift
        for first, last in self._bits.runs(offset >> shift, -(-end >> shift)):
            start = max(first << shift, offset)
            yield start, min(last << shift, end) - start

    @property
    def dirty_bytes(self) -> int:
        """Of whole granules: the last one may reach over the end of the disk."""
        with self.bits() as bits:
            return len(bits) << self._shift


def check_new(name: str, granularity: int) -> None:
    """Raises UsageError for what no bitmap can have."""
    if not name:
        raise UsageError("Bitmap name cannot be empty")
    if (
        granularity & (granularity - 1)
        or not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY
    ):
        raise UsageError("Granularity must be power of 2 and at least 512")
