"""Decoded units kept for the next small read of the same unit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.extents import Extent

_Key = tuple[int, int, int]


class UnitCache:
    """Decoded units by the place of their encoded form; bounded by bytes, least recently used out.

    Thread-safe. Units are immutable bytes. Whoever writes to a place that may hold an encoded unit
    calls ``forget`` before others can resolve it again.
    """

    def __init__(self, capacity: int = 4 << 20) -> None:
        self.capacity = capacity
        self._units: OrderedDict[_Key, bytes | bytearray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, extent: Extent) -> bytes | bytearray | None:
        key = (id(extent.node), extent.host_offset, extent.unit_offset)
        with self._lock:
            unit = self._units.get(key)
            if unit is not None:
                self._units.move_to_end(key)
            return unit

    def add(self, extent: Extent, unit: bytes | bytearray) -> None:
        if len(unit) > self.capacity:
            return
        key = (id(extent.node), extent.host_offset, extent.unit_offset)
        with self._lock:
            old = self._units.pop(key, b"")
            self._units[key] = unit
            self._bytes += len(unit) - len(old)
            while self._bytes > self.capacity:
                _, evicted = self._units.popitem(last=False)
                self._bytes -= len(evicted)

    def forget(self) -> None:
        """Forget everything."""
        with self._lock:
            self._units.clear()
            self._bytes = 0
