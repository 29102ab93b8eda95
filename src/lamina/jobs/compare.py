"""Whether two disks hold the same.

What is known to be zero on both sides is not read; what is on one has to be zero on the other.
Pieces are read and compared by worker threads, and the results looked at in order, so that the
first difference is the one reported.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator

from lamina.block.extents import Kind
from lamina.block.status import Status
from lamina.buffers import new_buffer
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.jobs.overlap import overlapped
from lamina.jobs.sources import Sources, side_by_side
from lamina.jobs.zeroes import is_zero
from lamina.records import dataclass
from lamina.units import MIB, SECTOR

if TYPE_CHECKING:
    from lamina.block.backend import Backend

_PIECE = 2 * MIB


class Difference(enum.Enum):
    CONTENT = "content"
    STATUS = "status"
    """``strict``: one side holds the bytes in another way."""
    SIZE = "size"


class Result(NamedTuple):
    difference: Difference
    offset: int
    """Bytes; of the sector that differs."""


@dataclass
class Settings:
    strict: bool = False
    """Sizes and what is allocated have to agree as well."""
    progress: Callable[[float], None] = lambda done: None
    sizes_differ: Callable[[], None] = lambda: None
    """Called when everything but the rest of the longer disk has been compared."""


class StatusUnknown(LaminaError):
    """What a disk holds could not be found out."""

    def __init__(self, number: int, cause: LaminaError) -> None:
        super().__init__(str(cause), errno=cause.errno)
        self.number = number
        """0: the first disk; 1: the second."""


class ReadFailed(LaminaError):
    """A disk could not be read."""

    def __init__(self, number: int, offset: int, cause: LaminaError) -> None:
        super().__init__(str(cause), errno=cause.errno)
        self.number = number
        self.offset = offset


class Piece:
    """A range that is of one kind on each side."""

    __slots__ = ("buffers", "difference", "length", "offset", "zero")

    def __init__(self) -> None:
        self.buffers = (new_buffer(_PIECE), new_buffer(_PIECE))
        self.difference: int | None = None

    def set(self, offset: int, length: int, zero: tuple[bool, bool]) -> Piece:
        self.offset, self.length, self.zero = offset, length, zero
        self.difference = None
        return self


class _Differs(Exception):
    def __init__(self, result: Result) -> None:
        self.result = result


def compare(one: Backend, other: Backend, settings: Settings | None = None) -> Result | None:
    """The first difference, or None. Raises StatusUnknown and ReadFailed."""
    return Comparison((one, other), Settings() if settings is None else settings).run()


class Comparison:
    def __init__(self, disks: tuple[Backend, Backend], settings: Settings) -> None:
        self.disks = disks
        self.settings = settings
        self.common = min(disk.size for disk in disks)
        self.size = max(disk.size for disk in disks)

    def run(self) -> Result | None:
        if self.settings.strict and self.common != self.size:
            return Result(Difference.SIZE, self.common)
        pool: list[Piece] = []
        workers = os.cpu_count() or 1
        try:
            overlapped(
                self.pieces(pool),
                self.look,
                lambda piece: self.judge(piece, pool),
                workers=workers,
                )
        except _Differs as found:
            return found.result
        return None

    # -- what there is to compare ----------------------------------------------------------------

    def pieces(self, pool: list[Piece]) -> Iterator[Piece]:
        """Ranges to be read, and one of no length where only a status is to be reported."""
        told = False
        for offset, end, zero, same in self.ranges():
            if offset >= self.common and not told:
                told = True
                yield self.piece(pool, self.common, 0, (True, True))
            if self.settings.strict and not same:
                piece = self.piece(pool, offset, 0, zero)
                piece.difference = offset
                yield piece
            if all(zero):
                if end - offset >= 1 << 30 and end != self.common:
                    yield self.piece(pool, end, 0, zero)
                continue
            for start in range(offset, end, _PIECE):
                yield self.piece(pool, start, min(_PIECE, end - start), zero)

    @staticmethod
    def piece(pool: list[Piece], offset: int, length: int, zero: tuple[bool, bool]) -> Piece:
        return (pool.pop() if pool else Piece()).set(offset, length, zero)

    def ranges(self) -> Iterator[tuple[int, int, tuple[bool, bool], bool]]:
        """(start, end, zero on each side, whether the status agrees), in order."""
        for start, end, one, other in side_by_side(self.side(0), self.side(1), self.size):
            zero = (one is None or one.reads_zero, other is None or other.reads_zero)
            yield start, end, zero, self.same(one, other)

    def side(self, number: int) -> Iterator[Status]:
        try:
            yield from Sources([self.disks[number]]).statuses()
        except LaminaError as error:
            raise StatusUnknown(number, error) from None

    def same(self, one: Status | None, other: Status | None) -> bool:
        """As far as QEMU's flags tell: present, data, zero, at a known place, up to the end."""
        return one is None or other is None or self.flags(one) == self.flags(other)

    def flags(self, status: Status) -> tuple[bool, ...]:
        extent = status.extent
        return (
            extent.kind != Kind.BELOW,
            extent.kind in (Kind.DATA, Kind.ENCODED, Kind.INLINE),
            status.reads_zero,
            extent.host_offset >= 0 and extent.kind != Kind.ENCODED and extent.cipher is None,
            extent.end == self.size,
        )

    # -- comparing -------------------------------------------------------------------------------

    def look(self, piece: Piece) -> None:
        """Read what is not zero of ``piece``, and find the first byte that differs."""
        if not piece.length:
            return
        for number in (0, 1):
            if not piece.zero[number]:
                self.read(number, piece)
        first, second = piece.buffers
        if piece.zero[0] or piece.zero[1]:
            data = second if piece.zero[0] else first
            if not is_zero(data, 0, piece.length):
                piece.difference = piece.offset + _first(
                    piece.length, lambda start, end: not is_zero(data, start, end)
                )
        elif not _equal(first, second, 0, piece.length):
            piece.difference = piece.offset + _first(
                piece.length, lambda start, end: not _equal(first, second, start, end)
            )

    def read(self, number: int, piece: Piece) -> None:
        view = memoryview(piece.buffers[number])[: piece.length]
        try:
            self.disks[number].readv([(piece.offset, view)])
        except LaminaError as error:
            raise ReadFailed(number, piece.offset, error) from None

    def judge(self, piece: Piece, pool: list[Piece]) -> None:
        if piece.difference is not None:
            kind = Difference.CONTENT if piece.length else Difference.STATUS
            raise _Differs(Result(kind, piece.difference))
        self.settings.progress((piece.offset + piece.length) / self.size if self.size else 1.0)
        if piece.offset == self.common < self.size and not piece.length:
            self.settings.sizes_differ()
        pool.append(piece)


def _equal(one: bytearray, other: bytearray, start: int, end: int) -> bool:
    if start == 0 and end == len(one):
        return one == other
    return one.startswith(memoryview(other)[start:end], start)


def _first(length: int, differs: Callable[[int, int], bool]) -> int:
    """Where the first sector begins that differs, of a range that does."""
    start, end = 0, length
    while end - start > SECTOR:
        middle = start + max((end - start) // 2 // SECTOR, 1) * SECTOR
        if differs(start, middle):
            end = middle
        else:
            start = middle
    return start
