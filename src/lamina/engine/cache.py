"""Decoded units kept for the next small read of the same unit."""

from __future__ import annotations

import threading
from collections import OrderedDict

from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.extents import Extent

_Key = tuple[int, int, int]


class UnitCache:
    """Decoded units by the place of their encoded form; bounded by bytes, least recently used out.

    Thread-safe. Units are immutable bytes. Whoever writes to a place that may hold an encoded unit
    calls ``forget`` before others can resolve it again. The latest unit is kept however large it
    is, and of several readers that want parts of one unit at a time, one decodes it (``begin``).
    """

    def __init__(self, capacity: int = 4 << 20) -> None:
        self.capacity = capacity
        self._units: OrderedDict[_Key, bytes | bytearray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._begun: set[_Key] = set()

    def get(self, extent: Extent) -> bytes | bytearray | None:
        key = _key(extent)
        with self._lock:
            unit = self._units.get(key)
            if unit is not None:
                self._units.move_to_end(key)
            return unit

    def begin(self, extent: Extent) -> bool:
        """Announce that this unit is going to be decoded. False: somebody else is at it.

        After True the caller owes a call of ``end``, and does not ``wait`` before that.
        """
        key = _key(extent)
        with self._lock:
            if key in self._begun:
                return False
            self._begun.add(key)
            return True

    def end(self, extent: Extent) -> None:
        """It was decoded (and added), or could not be."""
        with self._lock:
            self._begun.discard(_key(extent))
            self._ended.notify_all()

    def wait(self, extent: Extent) -> None:
        """Until nobody is decoding this unit."""
        key = _key(extent)
        with self._lock:
            while key in self._begun:
                self._ended.wait()

    def add(self, extent: Extent, unit: bytes | bytearray) -> None:
        key = _key(extent)
        with self._lock:
            old = self._units.pop(key, b"")
            self._units[key] = unit
            self._bytes += len(unit) - len(old)
            while self._bytes > self.capacity and len(self._units) > 1:
                _, evicted = self._units.popitem(last=False)
                self._bytes -= len(evicted)

    def forget(self) -> None:
        """Forget everything."""
        with self._lock:
            self._units.clear()
            self._bytes = 0


def _key(extent: Extent) -> _Key:
    return id(extent.node), extent.host_offset, extent.unit_offset
