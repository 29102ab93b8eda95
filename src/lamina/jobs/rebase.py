"""Keeping what a disk reads while another backing file takes the place of the old one.

Whatever comes from below is compared with what will come from the new backing file; units that
differ are copied into the disk itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.status import chain
from lamina.buffers import new_buffer
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.jobs.overlap import overlapped
from lamina.jobs.sources import Sources, side_by_side
from lamina.units import KIB, round_down, round_up

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node

_PIECE = 512 * KIB


class Piece:
    """Some units, what they read as now, and what they would read as."""

    __slots__ = ("differing", "future", "length", "offset", "present")

    def __init__(self, size: int) -> None:
        self.offset = self.length = 0
        self.present = new_buffer(size)
        self.future = new_buffer(size)
        self.differing: list[tuple[int, int]] = []
        """Start and end, within the piece."""


def rebase(
    disk: Backend,
    new: Backend | None,
    *,
    compressed: bool = False,
    progress: Callable[[float], None] = lambda done: None,
) -> None:
    """Prepare ``disk``, opened for writing on its old chain, for the new backing file (or none).

    The new backing file may be a part of the old chain. The name that the image stores is left to
    the caller to change. Raises what reading and writing raise.
    """
    if compressed and not disk.node.supports_compressed_writes:
        raise UsageError("Compression not supported for this file format")
    Rebase(disk, new, compressed, progress).run()


class Rebase:
    def __init__(
        self,
        disk: Backend,
        new: Backend | None,
        compressed: bool,
        progress: Callable[[float], None],
    ) -> None:
        self.disk = disk
        self.new = new
        self.compressed = compressed
        self.progress = progress
        self.unit = disk.limits.write_unit or max(disk.limits.write_zeroes_alignment, 1)
        if compressed:
            self.unit = disk.info().cluster_size or self.unit
        self.piece_size = max(_PIECE, self.unit)
        old = disk.node.unfiltered.backing
        self.old_size = old.size if old is not None else 0
        self.common = self.find_common()

    def find_common(self) -> Node | None:
        """The new backing file as a layer of the old chain, if it is one."""
        if self.new is None:
            return None
        for layer in chain(self.disk.node)[1:]:
            if same_image(layer, self.new.node):
                return layer
        return None

    def run(self) -> None:
        workers = os.cpu_count() or 1
        pool: list[Piece] = []
        overlapped(
            self.pieces(pool),
            self.look,
            lambda piece: self.write(piece, pool),
            workers=workers,
        )

    # -- what there is to compare ----------------------------------------------------------------

    def pieces(self, pool: list[Piece]) -> Iterator[Piece]:
        for start, end in self.units():
            for offset in range(start, end, self.piece_size):
                piece = pool.pop() if pool else Piece(self.piece_size)
                piece.offset, piece.length = offset, min(self.piece_size, end - offset)
                yield piece

    def units(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole units that may change, in order."""
        pending: tuple[int, int] | None = None
        for start, end in self.ranges():
            start = round_down(start, self.unit)
            end = min(round_up(end, self.unit), self.disk.size)
            if pending is not None and start <= pending[1]:
                pending = pending[0], max(end, pending[1])
                continue
            if pending is not None:
                yield pending
            pending = start, end
        if pending is not None:
            yield pending

    def ranges(self) -> Iterator[tuple[int, int]]:
        present = Sources([self.disk]).statuses(self.common)
        future = Sources([] if self.new is None else [self.new]).statuses()
        for start, end, now, then in side_by_side(present, future, self.disk.size):
            assert now is not None
            own = now.depth == 0 and now.extent.kind != Kind.BELOW
            shared = self.common is not None and now.extent.kind == Kind.BELOW
            if own or (shared and not now.reads_zero):
                continue
            if now.reads_zero and (then is None or then.reads_zero):
                continue
            yield start, end

    # -- doing it --------------------------------------------------------------------------------

    def look(self, piece: Piece) -> None:
        """Read both, and find the units that differ."""
        length = piece.length
        present, future = memoryview(piece.present)[:length], memoryview(piece.future)[:length]
        try:
            self.disk.readv([(piece.offset, present)])
        except LaminaError as error:
            raise error.in_context("error while reading from old backing file: ") from None
        inside = 0
        if self.new is not None:
            inside = max(min(length, self.new.size - piece.offset), 0)
        if self.new is not None and inside:
            try:
                self.new.readv([(piece.offset, future[:inside])])
            except LaminaError as error:
                raise error.in_context("error while reading from new backing file: ") from None
        future[inside:] = bytes(length - inside)
        piece.differing = []
        if piece.present.startswith(future):
            return
        for start in range(0, length, self.unit):
            end = min(start + self.unit, length)
            if piece.present.startswith(future[start:end], start):
                continue
            if piece.differing and piece.differing[-1][1] == start:
                piece.differing[-1] = piece.differing[-1][0], end
            else:
                piece.differing.append((start, end))

    def write(self, piece: Piece, pool: list[Piece]) -> None:
        view = memoryview(piece.present)
        # Behind the end of the old backing file there were only zeroes.
        edge = max(round_up(self.old_size, self.unit) - piece.offset, 0)
        writes = []
        zeroes = []
        for start, end in piece.differing:
            middle = min(max(edge, start), end)
            if start < middle:
                writes.append((piece.offset + start, view[start:middle]))
            if middle < end:
                zeroes.append((piece.offset + middle, end - middle))
        try:
            if writes and self.compressed:
                self.disk.write_compressed(writes)
            elif writes:
                self.disk.writev(writes)
            for offset, length in zeroes:
                self.disk.write_zeroes(offset, length, WriteFlags.NONE)
        except LaminaError as error:
            raise error.in_context("Error while writing to COW image: ") from None
        self.progress((piece.offset + piece.length) / self.disk.size)
        pool.append(piece)


def same_image(one: Node, other: Node) -> bool:
    """Whether two nodes were opened on the same storage with the same driver."""
    return (
        one.driver == other.driver
        and bool(one.filename)
        and _place(one.filename) == _place(other.filename)
    )


def _place(filename: str) -> str:
    from lamina.block.filenames import local_file

    path = local_file(filename)
    return filename if path is None else os.path.realpath(path)
