"""Copy on write: the old content around a write, brought over to the new place.

What is known to be zero is not read, and where the new place reads as zeroes it is not written.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.extents import Kind
from lamina.buffers import new_buffer
from lamina.engine.reader import ZEROES
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node, ReadRequest
    from lamina.engine.disk import Disk
    from lamina.engine.mapping import Piece

Parts = Sequence[memoryview]


class Copies:
    """Heads and tails of the pieces of one reservation."""

    def __init__(self, disk: Disk, pieces: Sequence[Piece]) -> None:
        """Under the disk's lock: find out what has to be read."""
        self._disk = disk
        self._reads: list[ReadRequest] = []
        self._parts: list[tuple[Parts, Parts]] = []
        for piece in pieces:
            head = self._plan(piece, piece.guest_offset - piece.copy_head, piece.copy_head)
            tail = self._plan(piece, piece.guest_offset + piece.length, piece.copy_tail)
            self._parts.append((head, tail))
        self._sources = disk.reader.plan(self._reads)

    def _plan(self, piece: Piece, offset: int, length: int) -> Parts:
        if not length:
            return ()
        if reads_zero(self._disk, offset, length, deep=False):
            if piece.reads_zero and piece.cipher is None:
                return ()
            return zeroes(length)
        old = memoryview(new_buffer(length))
        self._reads.append((offset, old))
        return (old,)

    @property
    def any(self) -> bool:
        """Something is to be written beside the data."""
        return any(head or tail for head, tail in self._parts)

    def read(self) -> None:
        """Without the lock: fetch the old content."""
        if self._reads:
            self._disk.file.event("cow_read")
            self._disk.reader.fetch(self._sources)

    def of(self, number: int) -> tuple[Parts, Parts]:
        """What to write before and behind the data of a piece; nothing where zeroes are there."""
        return self._parts[number]


def zeroes(length: int) -> list[memoryview]:
    """So many zero bytes, as views of a few that exist."""
    whole, rest = divmod(length, len(ZEROES))
    return [ZEROES] * whole + ([ZEROES[:rest]] if rest else [])


def reads_zero(disk: Disk, offset: int, length: int, *, deep: bool = True) -> bool:
    """Whether tables say that the range reads as zeroes; ``deep``: those of the backing files too.

    Under the disk's lock.
    """
    inside = disk.reader.inside_backing()
    for extent in disk.mapping.resolve(offset, length):
        if extent.kind == Kind.ZERO:
            continue
        if extent.kind != Kind.BELOW:
            return False
        start, end = extent.guest_offset, min(extent.end, inside)
        if start < end and not (deep and _node_reads_zero(disk.backing, start, end - start)):
            return False
    return True


def _node_reads_zero(node: Node | None, offset: int, length: int) -> bool:
    if node is None:
        return True
    for extent in node.extents(offset, length):
        if extent.kind == Kind.ZERO:
            continue
        if extent.kind != Kind.BELOW:
            return False
        below = node.backing
        start, end = extent.guest_offset, 0 if below is None else min(extent.end, below.size)
        if start < end and not _node_reads_zero(below, start, end - start):
            return False
    return True
