"""The extents of a disk: runs of guest bytes, each kept in a way of its own.

``Extent`` in names from ``lamina.block`` is a run of bytes of one fate; an extent of VMware's is a
``VmdkExtent`` here. Offsets are guest offsets of the whole disk unless they say otherwise.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.engine.coalescing import append_extent
from lamina.engine.mapping import Piece
from lamina.errors import ImageCorrupt, Refused, StorageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vmdk.allocation import VmdkReservation
    from lamina.formats.vmdk.descriptor import ExtentLine

Entries = Sequence[int]
ZERO_GRAIN = 1
"""In place of the sector of a grain, once tables are read: it reads as zeroes. 0: not here."""


class VmdkExtent(ABC):
    """``node`` holds its bytes; None: nothing does."""

    format: str
    """As descriptors and ``info`` call it; "" for the only extent of a file."""
    grain: int = 0
    """Bytes allocated as one; 0: everything has its place."""
    compressed = False
    is_last = True
    """Nothing follows: the last grain may reach behind the end."""

    def __init__(self, start: int, length: int, node: Node | None, *, writable: bool) -> None:
        self.start = start
        self.length = length
        self.node = node
        self.writable = writable

    @property
    def end(self) -> int:
        return self.start + self.length

    @abstractmethod
    def resolve(self, offset: int, length: int) -> list[Extent]:
        """As ``Mapping.resolve``, inside of this extent (or of its last grain)."""

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        yield Columns.from_extents(self.resolve(offset, length))

    def reserve(self, offset: int, length: int, reservation: VmdkReservation) -> None:
        """Add pieces for a write. Raises Refused where nothing can be written."""
        raise self.refusal()

    def zero(self, offset: int, length: int) -> bool:
        """Whole grains; False: this cannot be said here."""
        return False

    def discard(self, offset: int, length: int) -> None:
        """Whole grains."""

    def finish(self) -> None:
        """Last words, if anything was written, when everything is durable."""

    def check_writable(self) -> None:
        """Raises Refused if no disk with this extent can be written."""

    def refusal(self) -> Refused:
        return Refused(
            "This extent is read-only",
            path=self.node.filename if self.node else None,
            format="vmdk",
            errno=errno.EACCES,
        )


class FlatExtent(VmdkExtent):
    """Bytes of a file, one after the other."""

    def __init__(
        self,
        start: int,
        length: int,
        node: Node,
        *,
        host_offset: int = 0,
        format: str = "FLAT",
        writable: bool,
    ) -> None:
        super().__init__(start, length, node, writable=writable)
        self.format = format
        self.host_offset = host_offset

    def resolve(self, offset: int, length: int) -> list[Extent]:
        # What a file that is too short lacks is zero, and written to where it should be.
        place = self.host_offset + offset - self.start
        return [Extent(offset, length, Kind.DATA, self.node, place)]

    def reserve(self, offset: int, length: int, reservation: VmdkReservation) -> None:
        if not self.writable:
            raise self.refusal()
        assert self.node is not None
        place = self.host_offset + offset - self.start
        reservation.pieces.append(Piece(offset, length, self.node, place))

    def discard(self, offset: int, length: int) -> None:
        if self.writable and self.node is not None:
            self.node.discard(self.host_offset + offset - self.start, length)


class ZeroExtent(VmdkExtent):
    """Zeroes, kept nowhere."""

    format = "ZERO"

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length, None, writable=False)

    def resolve(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.ZERO)]

    def zero(self, offset: int, length: int) -> bool:
        return True


class NoAccessExtent(VmdkExtent):
    """Bytes that the descriptor says nobody may touch."""

    def __init__(self, start: int, line: ExtentLine) -> None:
        super().__init__(start, line.length, None, writable=False)
        self.format = line.type

    def resolve(self, offset: int, length: int) -> list[Extent]:
        raise StorageError.from_errno(errno.EIO)


class GrainExtent(VmdkExtent):
    """Grains that tables name: what all kinds of sparse extents have in common."""

    codec = ""
    node: Node

    def __init__(
        self, start: int, length: int, node: Node, grain: int, *, format: str, writable: bool
    ) -> None:
        super().__init__(start, length, node, writable=writable)
        self.grain = grain
        self.format = format
        self.file_end = node.size
        """No grain begins behind this."""

    def misplaced_table(self, offset: int, number: int, place: int) -> ImageCorrupt:
        """The error for entry ``number`` of the grain directory, which itself is at ``place``."""
        return ImageCorrupt(
            f"Grain table at {offset:#x} lies outside of the image",
            path=self.node.filename,
            format="vmdk",
            structure="grain directory",
            field=f"entry {number}",
            offset=place,
        )

    @abstractmethod
    def entries(self, first: int, count: int) -> Iterator[tuple[int, int, Entries | None]]:
        """(number of a grain, how many, their sectors in the file) of runs that cover these grains.

        ZERO_GRAIN and 0 as above; None: all are 0. Raises ImageCorrupt.
        """

    @abstractmethod
    def entries_array(self, first: int, count: int) -> object:
        """The same as one numpy array of int64."""

    # -- reading ---------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> list[Extent]:
        grain = self.grain
        end = offset + length
        first = (offset - self.start) // grain
        last = -(-(end - self.start) // grain)
        found: list[Extent] = []
        for number, count, sectors in self.entries(first, last - first):
            place = self.start + number * grain
            if sectors is None or not any(sectors):
                append_extent(found, Extent(place, count * grain, Kind.BELOW))
                continue
            for index, sector in enumerate(sectors):
                here = place + index * grain
                if sector > ZERO_GRAIN:
                    extent = self._grain(here, sector, sectors, index)
                else:
                    extent = Extent(here, grain, Kind.ZERO if sector else Kind.BELOW)
                append_extent(found, extent)
        if found:
            found[0] = found[0].cut(offset, found[0].end)
            found[-1] = found[-1].cut(found[-1].guest_offset, end)
        return found

    def _grain(self, guest_offset: int, sector: int, sectors: Entries, index: int) -> Extent:
        place = self.place(guest_offset, sector)
        if not self.compressed:
            return Extent(guest_offset, self.grain, Kind.DATA, self.node, place)
        return Extent(
            guest_offset,
            self.grain,
            Kind.ENCODED,
            self.node,
            place,
            stored_length=self._stored(sector, sectors, index),
            codec=self.codec,
            unit_offset=guest_offset,
            unit_length=self.grain,
        )

    def _stored(self, sector: int, sectors: Entries, index: int) -> int:
        """Bytes that a compressed grain may have: its marker alone knows, but grains mostly stand
        one behind the other."""
        most = 2 * self.grain
        if index + 1 < len(sectors):
            gap = (sectors[index + 1] - sector) * 512
            if 0 < gap < most:
                return gap
        return most

    def place(self, guest_offset: int, sector: int) -> int:
        """Host offset of a grain. Raises ImageCorrupt if it lies behind the end of the file."""
        place = sector * 512
        if place >= self.file_end:
            raise ImageCorrupt(
                f"Grain at {place:#x} lies behind the end of the image",
                path=self.node.filename,
                format="vmdk",
                structure="grain table",
                field=f"entry of guest offset {guest_offset:#x}",
            )
        return place

    # -- reading, whole images -------------------------------------------------------------------

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        from lamina.formats.vmdk.columns import grain_columns

        return grain_columns(self, offset, length)
