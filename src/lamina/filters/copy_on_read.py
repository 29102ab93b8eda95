"""copy-on-read: what is read from a backing file is written into the image above it.

The next reader finds it there, and the backing file may one day be dispensed with. Whole allocation
units are copied, all of those that a read touches; ranges that no backing file holds become
explicit zeroes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.alignment import RangeLocks
from lamina.block.driver import Driver
from lamina.block.extents import Kind
from lamina.block.filter import FilterNode
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.options import Type, option
from lamina.block.permissions import Perm
from lamina.block.zeroes import is_zero
from lamina.errors import Refused, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import MIB, round_down, round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext

_PIECE = 2 * MIB
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class CopyOnReadOptions:
    bottom: str | None = option(
        "bottom", Type.STRING, None, "node of the lowest layer that is copied from"
    )


class CopyOnReadNode(FilterNode):
    driver = "copy-on-read"

    def __init__(self, options: NodeOptions, file: Node, bottom: str | None = None) -> None:
        """Raises UsageError if no layer of the chain below is called ``bottom``."""
        sources = None if bottom is None else _layers_to(bottom, file)
        super().__init__(options, file)
        self._in_use = RangeLocks()
        self._sources = sources

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Reading writes, but changes nothing that anybody sees."""
        if perm and not self.read_only:
            perm |= Perm.WRITE_UNCHANGED
        return perm, shared

    # -- reading ---------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self.file.readv(requests)
        if not self.read_only:
            for offset, buffer in requests:
                if len(buffer):
                    self._bring_up(offset, offset + len(buffer))

    def _bring_up(self, start: int, end: int) -> None:
        """Copy what the image does not hold of the allocation units from ``start`` to ``end``."""
        unit = self.file.unfiltered.limits.write_zeroes_alignment
        start, end = round_down(start, unit), min(round_up(end, unit), self.size)
        if next(self._missing(start, end), None) is None:
            return
        with self._in_use.exclusive((start, end)):
            for offset, length in self._missing(start, end):
                for at in range(offset, offset + length, _PIECE):
                    self._copy(at, min(_PIECE, offset + length - at))

    def _copy(self, offset: int, length: int) -> None:
        data = self.file.read(offset, length)
        self.file.event("cor_write")
        if is_zero(data):
            self.file.write_zeroes(offset, length, WriteFlags.UNCHANGED)
        else:
            self.file.writev([(offset, data)], WriteFlags.UNCHANGED)

    def _missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the image does not hold and we may copy, in order."""
        for extent in self.file.extents(start, end - start):
            if extent.kind is not Kind.BELOW:
                continue
            if self._sources is None:
                yield extent.guest_offset, extent.length
            else:
                yield from _held(self._sources, extent.guest_offset, extent.end)

    # -- everything else goes down ---------------------------------------------------------------

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        with self._in_use.shared([(offset, offset + len(data)) for offset, data in requests]):
            self.file.writev(requests, flags)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        with self._in_use.shared([(offset, offset + len(data)) for offset, data in requests]):
            self.file.write_compressed(requests)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        with self._in_use.shared([(offset, offset + length)]):
            self.file.write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        with self._in_use.shared([(offset, offset + length)]):
            self.file.discard(offset, length)

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        with self._in_use.exclusive((min(size, self.size), 1 << 63)):
            self.file.truncate(size, preallocation, exact=exact, zeroed=zeroed)


def _layers(node: Node) -> list[Node]:
    """The image and its backing files, without filters."""
    layers = []
    layer: Node | None = node.unfiltered
    while layer is not None:
        layers.append(layer)
        layer = layer.backing
        layer = layer.unfiltered if layer is not None else None
    return layers


def _layers_to(bottom: str, node: Node) -> list[Node]:
    """The backing files of ``node`` down to the one that is called ``bottom``."""
    layers = _layers(node)
    names = [layer.name for layer in layers]
    if bottom not in names:
        raise UsageError(f"Bottom node '{bottom}' not found")
    return layers[1 : names.index(bottom) + 1]


def _held(layers: Sequence[Node], start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what one of these layers holds, asked from the first to the last."""
    if not layers:
        return
    end = min(end, layers[0].size)
    if end <= start:
        return
    for extent in layers[0].extents(start, end - start):
        if extent.kind is Kind.BELOW:
            yield from _held(layers[1:], extent.guest_offset, extent.end)
        else:
            yield extent.guest_offset, extent.length


class CopyOnReadDriver(Driver):
    name = "copy-on-read"
    Options = CopyOnReadOptions

    def open(self, options: CopyOnReadOptions, context: OpenContext) -> Node:
        file = context.open_child("file")
        if context.node_options.read_only and not context.inspect:
            raise Refused("Block node is read-only")
        return CopyOnReadNode(context.node_options, file, options.bottom)


DRIVER = CopyOnReadDriver()
