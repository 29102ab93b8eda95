"""How a node marks what is written to it in its dirty bitmaps.

A node that has bitmaps gets its methods that change data replaced, on the instance alone: nodes
without bitmaps pay nothing. Marks are made twice. Before a request begins, so that a bitmap that is
stored at any later moment tells of it; and once it is over, whether or not it succeeded, so that
somebody who cleaned a granule and read it while the request was under way finds it dirty again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lamina.block.limits import Preallocation, WriteFlags
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.node import Node, WriteRequest

_UNCHANGED = WriteFlags.UNCHANGED


def track(node: Node, bitmap: DirtyBitmap) -> None:
    """Mark what is written from now on in ``bitmap``; requests under way are not seen.

    That no other bitmap of the node has its name is the caller's business.
    """
    if not node.dirty_bitmaps:
        stand_in = StandIn(node)
        for name in METHODS:
            setattr(node, name, getattr(stand_in, name))
    node.dirty_bitmaps.append(bitmap)


def untrack(node: Node, bitmap: DirtyBitmap) -> None:
    """Mark nothing in ``bitmap`` any more."""
    node.dirty_bitmaps.remove(bitmap)
    if not node.dirty_bitmaps:
        stand_in = getattr(node.writev, "__self__", None)
        assert isinstance(stand_in, StandIn)
        for name in METHODS:
            del node.__dict__[name]
        node.__dict__.update(stand_in.before)


METHODS = (
    "writev",
    "write_compressed",
    "write_zeroes",
    "_discard",
    "copy_range_from",
    "truncate",
)
"""Of a node: what changes its data."""


class StandIn:
    """Has a method in place of each of ``METHODS``, which calls the original and marks."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._bitmaps = node.dirty_bitmaps
        self.before: dict[str, Any] = {
            name: node.__dict__[name] for name in METHODS if name in node.__dict__
        }
        """What the instance had in place of the methods of its class."""
        self._writev = node.writev
        self._write_compressed = node.write_compressed
        self._write_zeroes = node.write_zeroes
        self._discard_below: Callable[[int, int], None] = node._discard
        self._copy_range_from = node.copy_range_from
        self._truncate = node.truncate

    def _mark(self, spans: Sequence[tuple[int, int]]) -> None:
        for bitmap in self._bitmaps:
            bitmap.mark(spans)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        # Most writes have no flags, and operators of an enum are slow.
        if flags and flags & _UNCHANGED:
            self._writev(requests, flags)
            return
        spans = [(offset, len(data)) for offset, data in requests]
        self._mark(spans)
        try:
            self._writev(requests, flags)
        finally:
            self._mark(spans)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        spans = [(offset, len(data)) for offset, data in requests]
        self._mark(spans)
        try:
            self._write_compressed(requests)
        finally:
            self._mark(spans)

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        spans = [] if flags & _UNCHANGED else [(offset, length)]
        self._mark(spans)
        try:
            self._write_zeroes(offset, length, flags)
        finally:
            self._mark(spans)

    def _discard(self, offset: int, length: int) -> None:
        self._mark([(offset, length)])
        try:
            self._discard_below(offset, length)
        finally:
            self._mark([(offset, length)])

    def copy_range_from(self, source: Node, source_offset: int, offset: int, length: int) -> int:
        self._mark([(offset, length)])
        try:
            return self._copy_range_from(source, source_offset, offset, length)
        finally:
            self._mark([(offset, length)])

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        try:
            self._truncate(size, preallocation, exact=exact, zeroed=zeroed)
        finally:
            for bitmap in self._bitmaps:
                if not bitmap.inconsistent:
                    bitmap.resize(self._node.size)
