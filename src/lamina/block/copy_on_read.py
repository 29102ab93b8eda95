"""A user that brings what it reads from backing files into the top layer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.block.backend import Backend
from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.zeroes import is_zero
from lamina.units import round_down, round_up

if TYPE_CHECKING:
    from lamina.block.node import ReadRequest, WriteRequest

_STEP = 1 << 20
"""Bytes that are copied at a time."""


class CopyOnReadBackend(Backend):
    """Reads copy whole allocation units up before they answer.

    Copies exclude this user's own changes, or they might undo them; it must be the only one that
    writes.
    """

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._changes = threading.RLock()

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            self._check_range(offset, len(buffer))
            with self._changes:
                self._copy_up(offset, len(buffer))
        super().readv(requests)

    def _copy_up(self, offset: int, length: int) -> None:
        unit = self.node.limits.write_zeroes_alignment
        start = round_down(offset, unit)
        end = min(round_up(offset + length, unit), self.node.size)
        for extent in self.node.unfiltered.extents(start, end - start):
            if extent.kind is not Kind.BELOW:
                continue
            for place in range(extent.guest_offset, extent.end, _STEP):
                self._copy(place, min(_STEP, extent.end - place))

    def _copy(self, offset: int, length: int) -> None:
        data = self.node.read(offset, length)
        if is_zero(data):
            self.node.write_zeroes(offset, length, WriteFlags.UNCHANGED)
        else:
            self.node.writev([(offset, data)], WriteFlags.UNCHANGED)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        with self._changes:
            super().writev(requests, flags)

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        with self._changes:
            super().write_zeroes(offset, length, flags)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        with self._changes:
            super().write_compressed(requests)

    def discard(self, offset: int, length: int) -> None:
        with self._changes:
            super().discard(offset, length)
