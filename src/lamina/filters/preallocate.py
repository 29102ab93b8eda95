"""preallocate: lets a file grow in large steps, so that its file system allocates in large pieces.

Stands between a format and its protocol. Whoever writes behind the end of the file first gets a
generous stretch of zeroes there, if the protocol can make that quickly; users are told the end of
what was really written, and the rest is cut off when the last of them stops writing.

    0 ------------ zero_start ---- data_end ---- file_end
      may hold data   zeroes that        zeroes that nobody
                      users know of      knows of

Only one writer can keep such a secret: it exists while the permissions to write and to resize are
held.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lamina.block.driver import Driver
from lamina.block.filter import FilterNode
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, WriteRequest
from lamina.block.options import Type, option
from lamina.block.permissions import Perm
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import MIB, SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext

_GROWING = Perm.WRITE | Perm.RESIZE


@dataclass(frozen=True)
class PreallocateOptions:
    align: int = option("prealloc-align", Type.SIZE, MIB, "align the end of the file to this")
    size: int = option("prealloc-size", Type.SIZE, 128 * MIB, "how much to preallocate")


@dataclass
class Tail:
    """The end of the file as we know it. All figures in bytes; see the module's text."""

    zero_start: int
    data_end: int
    file_end: int


class PreallocateNode(FilterNode):
    driver = "preallocate"

    def __init__(self, options: NodeOptions, file: Node, own: PreallocateOptions) -> None:
        super().__init__(options, file)
        self._align = max(own.align, 1)
        self._step = own.size
        self._tail: Tail | None = None
        self._guard = threading.Lock()

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        tail = self._tail
        return self.file.size if tail is None else round_up(tail.data_end, SECTOR)

    # -- data ------------------------------------------------------------------------------------

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        end = max((offset + len(data) for offset, data in requests), default=0)
        tail = self._tail
        if tail is not None and end > tail.zero_start:
            with self._guard:
                self._grow(tail, end)
                tail.zero_start = max(tail.zero_start, end)
        self.file.writev(requests, flags)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        end = offset + length
        tail = self._tail
        if tail is not None and end > tail.zero_start:
            with self._guard:
                self._grow(tail, end)
                if offset >= tail.zero_start and end <= tail.file_end:
                    return  # these zeroes are there already
                tail.zero_start = max(tail.zero_start, end)
                tail.file_end = max(tail.file_end, end)
        self.file.write_zeroes(offset, length, flags)

    def _grow(self, tail: Tail, end: int) -> None:
        """Users are about to write up to ``end``: there should be room for them and for more.

        A failure to make it is no failure of theirs: then the write itself lets the file grow.
        """
        tail.data_end = max(tail.data_end, end)
        if end <= tail.file_end:
            return
        new_end = round_up(end + self._step, self._align)
        try:
            self.file.write_zeroes(tail.file_end, new_end - tail.file_end, WriteFlags.NO_FALLBACK)
        except LaminaError:
            tail.zero_start = tail.file_end = max(end, self.file.size)
        else:
            tail.file_end = new_end

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        with self._guard:
            tail = self._tail
            if tail is None:
                self.file.truncate(size, preallocation, exact=exact, zeroed=zeroed)
                return
            hidden = preallocation is Preallocation.OFF and tail.data_end <= size <= tail.file_end
            if hidden and tail.zero_start <= tail.data_end:
                tail.data_end = size
                return
            self._cut(tail)
            self.file.truncate(size, preallocation, exact=exact, zeroed=zeroed)
            end = self.file.size
            self._tail = Tail(end, end, end)

    def _cut(self, tail: Tail) -> None:
        """Give back what nobody knows of."""
        if tail.file_end > tail.data_end:
            self.file.truncate(tail.data_end)
            tail.file_end = tail.data_end
            tail.zero_start = min(tail.zero_start, tail.data_end)

    # -- life ------------------------------------------------------------------------------------

    def refresh_permissions(self) -> None:
        """The tail has to go before the permission to cut it does."""
        perm, _ = self.cumulative_permissions()
        growing = perm & _GROWING == _GROWING
        if not growing:
            self._drop()
        super().refresh_permissions()
        if growing and self._tail is None:
            end = self.file.size
            self._tail = Tail(end, end, end)

    def _drop(self) -> None:
        """Raises what cutting the tail off raises."""
        with self._guard:
            tail, self._tail = self._tail, None
            if tail is not None:
                try:
                    self._cut(tail)
                except LaminaError as error:
                    raise error.in_context("Failed to drop preallocation: ") from None

    def _close(self) -> None:
        self._drop()


class PreallocateDriver(Driver):
    name = "preallocate"
    Options = PreallocateOptions

    def open(self, options: PreallocateOptions, context: OpenContext) -> Node:
        if options.align % SECTOR:
            raise UsageError("prealloc-align parameter of preallocate filter is not aligned to 512")
        file = context.open_child("file")
        alignment = file.limits.request_alignment
        if options.align % alignment:
            raise UsageError(
                "prealloc-align parameter of preallocate filter is not aligned to underlying node "
                f"request alignment ({alignment})"
            )
        return PreallocateNode(context.node_options, file, options)


DRIVER = PreallocateDriver()
