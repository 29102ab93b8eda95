"""Where guest bytes live in a VHD image.

Fixed disks are their data with a footer behind. Dynamic and differencing ones are blocks that a
table (the BAT) names; in front of the data of each block is a bitmap of its sectors. Dynamic disks
have all of a block once they have any of it, and their bitmaps matter only to other programs;
differencing ones have the sectors whose bit is set, and their parent has the rest.

Data is written first, then bitmaps and the footer behind the last block, then BAT entries, with a
flush between: a crash leaves space that nobody names, and may cut off the footer, whose copy at the
beginning of the file is as good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.filenames import full_backing_filename
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.appending import Appender
from lamina.engine.blocktable import BlockMapping, BlockReservation, BlockTable
from lamina.engine.mapping import InPlace, Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.errors import ImageCorrupt
from lamina.formats.vpc.bitmaps import Bitmaps
from lamina.formats.vpc.footer import TrailingFooter
from lamina.formats.vpc.layout import DIFFERENCING, FOOTER_SIZE, FREE, HEADER_SIZE, Footer, Header
from lamina.hints import TYPE_CHECKING
from lamina.units import PAGE, SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import WriteRequest
    from lamina.engine.disk import Disk

FIXED_UNIT = 1 << 16
"""Guest bytes that writers of a fixed disk exclude each other from."""


class VpcMapping(Mapping):
    """What all kinds of image have in common."""

    driver = "vpc"

    def __init__(self, disk: Disk, footer: Footer, size: int) -> None:
        self.disk = disk
        self.file = self.data_node = disk.file
        self.footer = footer
        self.size = size
        self.metadata = Metadata(self.file)

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.vpc.resize import resize

        resize(self, size, preallocation)

    def info(self) -> NodeInfo:
        return NodeInfo(
            self.disk.filename, "vpc", self.size, self.file.info().actual_size
        )


class FixedMapping(VpcMapping):
    """Every byte has its place: the same one as in the guest."""

    fixed = True
    unit = FIXED_UNIT
    write_unit = discard_unit = PAGE

    def resolve(self, offset: int, length: int) -> list[Extent]:
        inside = max(min(length, self.size - offset), 0)
        extents = [Extent(offset, inside, Kind.DATA, self.file, offset)] if inside else []
        if inside < length:
            # The rest of the last unit: there is the footer.
            extents.append(Extent(offset + inside, length - inside, Kind.ZERO))
        return extents

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        return [offset for offset, _ in requests]

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        return [offset for offset, _ in requests]

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        return InPlace([Piece(offset, length, self.file, offset) for offset, length in ranges])

    def discard(self, offset: int, length: int) -> None:
        self.file.discard(offset, min(length, self.size - offset))


class DynamicMapping(VpcMapping, BlockMapping):
    """Blocks, named by the BAT."""

    scale = block_alignment = SECTOR

    def __init__(
        self, disk: Disk, footer: Footer, size: int, header: Header, backing_name: str | None
    ) -> None:
        """Of structures that are sound. Raises ImageCorrupt if the file is too short for them."""
        super().__init__(disk, footer, size)
        self.backing_name = backing_name
        self.group = min(PAGE, header.block_size)
        """Bytes of sectors that become ours together: those of a byte of the bitmap, for there are
        readers that get parts of one wrong."""
        self.write_unit = self.discard_unit = self.group
        self.use_kind()
        self.unit = header.block_size
        self.base = self.prefix = header.bitmap_bytes
        self.block_bytes = header.bitmap_bytes + header.block_size
        self.bitmaps = Bitmaps(self.metadata, header.bitmap_bytes)
        self.use_header(header)
        # A BAT entry is 32 bits of sectors, the largest of which means nothing.
        self.appender = Appender(self.file, self.find_end(), limit=(FREE - 1) * SECTOR)
        self.trailer = TrailingFooter(lambda: self.appender.end, lambda: self.footer)
        self.metadata.register(self.trailer)
        self.gate: Callable[[], None] = lambda: None
        """What is to be repaired before the first change."""

    def use_kind(self) -> None:
        """The footer says whether there is a parent."""
        self.has_backing = self.footer.disk_type == DIFFERENCING
        # Without one, what is not there is zero for certain: there is nothing below.
        self.special = {FREE: Kind.BELOW if self.has_backing else Kind.ZERO}

    def use_header(self, header: Header) -> None:
        """Another table takes effect; nothing is dirty."""
        self.header = header
        self.table = BlockTable(
            self.metadata,
            host_offset=header.table_offset,
            entries=header.max_table_entries,
            byteorder="big",
            stage=Stage.ROOTS,
        )

    def find_end(self) -> int:
        """Host offset behind everything. Raises ImageCorrupt if the file is shorter than that."""
        header = self.header
        size = self.file.size
        end = -1
        if header.table_offset + 4 * header.max_table_entries <= size:
            highest = self.table.highest(self.special)
            end = max(
                header.table_end,
                self.footer.data_offset + HEADER_SIZE,
                highest * SECTOR + self.block_bytes if highest >= 0 else 0,
                *(
                    round_up(locator.offset + locator.length, SECTOR)
                    for locator in header.locators
                    if locator.offset + locator.length <= size
                ),
            )
        if not 0 <= end <= size:
            raise ImageCorrupt(
                "block-vpc: free_data_block_offset points after the end of file. The image has "
                "been truncated.",
                path=self.file.filename,
                format="vpc",
                structure="block allocation table",
                offset=header.table_offset,
            )
        return end

    def check_places(self, block: int, lowest: int, highest: int) -> None:
        """No block lies in the copy of the footer, the header or the table."""
        header = self.header
        for place in (lowest, highest):
            start = place - self.prefix
            apart = start >= header.table_end or start + self.block_bytes <= header.table_offset
            if start < FOOTER_SIZE + HEADER_SIZE or not apart:
                raise ImageCorrupt(
                    f"Block {block} lies at {start:#x}, in the metadata of the image",
                    path=self.file.filename,
                    format="vpc",
                    structure="block allocation table",
                    field=f"entry {block}",
                    offset=header.table_offset + 4 * block,
                )

    # -- reading ---------------------------------------------------------------------------------

    def _units(self, offset: int, length: int) -> Iterator[tuple[int, Kind, int]]:
        units = super()._units(offset, length)
        if not self.has_backing:
            yield from units
            return
        for guest, kind, place in units:
            if kind is not Kind.DATA:
                yield guest, kind, place
                continue
            first = max(offset - guest, 0) // SECTOR
            end = -(-min(offset + length - guest, self.unit) // SECTOR)
            for start, there in self.bitmaps.runs(place - self.prefix, first, end):
                at = start * SECTOR
                yield guest + at, Kind.DATA if there else Kind.BELOW, place + at if there else -1

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        # Sectors of a differencing image have each a fate of their own.
        return (Mapping if self.has_backing else BlockMapping).columns(self, offset, length)

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        if self.has_backing:
            return [self._marked_spot(offset, len(buffer)) for offset, buffer in requests]
        return super().locate(requests)

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        return [self._marked_spot(offset, len(data)) for offset, data in requests]

    def _marked_spot(self, offset: int, length: int) -> int:
        """Host offset of a range inside of one block whose sectors are all marked, or -1."""
        spot = self._spot(offset, length)
        if spot < 0:
            return -1
        skip = offset % self.unit
        start = spot - skip - self.prefix
        first, end = skip // SECTOR, -(-(skip + length) // SECTOR)
        return spot if self.bitmaps.all_set(start, first, end) else -1

    # -- writing ---------------------------------------------------------------------------------

    def before_first_write(self) -> None:
        self.gate()
        self.gate = lambda: None

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        reservation = super().reserve(ranges)
        assert isinstance(reservation, VpcReservation)
        try:
            reservation.hold()
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def reservation(self) -> BlockReservation:
        return VpcReservation(self)

    def added(self, block: int, host_offset: int) -> None:
        self.trailer.touch()

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, min(length, self.size - offset))

    def publish(self, footer: Footer) -> None:
        """Both footers say it. Durable on return, like everything before."""
        self.metadata.commit()
        self.metadata.barrier()
        self.footer = footer
        self.file.write(0, footer.pack())
        self.file.flush()
        self.trailer.touch()
        self.metadata.commit()
        self.metadata.barrier()

    def close(self) -> None:
        self.appender.trim(keep=FOOTER_SIZE)

    def info(self) -> NodeInfo:
        about = super().info()
        about.cluster_size = self.unit
        if self.backing_name is not None:
            about.backing_filename = self.backing_name
            about.full_backing_filename = full_backing_filename(self.disk, self.backing_name)
            about.backing_format = "vpc"
        return about


class VpcReservation(BlockReservation):
    """Blocks with the sectors that are to be marked in their bitmaps."""

    _mapping: DynamicMapping

    def __init__(self, mapping: DynamicMapping) -> None:
        super().__init__(mapping)
        self._marks: list[tuple[int, int, int]] = []
        """Host offset of a block, first sector, end."""

    def within(self, place: int, start: int, end: int) -> None:
        """Groups that are not all there yet are written as wholes, the rest of them from below."""
        mapping = self._mapping
        skip = start % mapping.unit
        block = place - skip - mapping.prefix
        group = mapping.group if mapping.has_backing else SECTOR
        head, tail = start % group, -end % group
        first, stop = (skip - head) // SECTOR, (skip + end - start + tail) // SECTOR
        if mapping.bitmaps.all_set(block, first, stop):
            super().within(place, start, end)
            return
        self._marks.append((block, first, stop))
        if not mapping.has_backing:
            super().within(place, start, end)
            return
        self.pieces.append(
            Piece(
                start,
                end - start,
                mapping.file,
                place,
                copy_head=head,
                copy_tail=tail,
                fresh=True,
            )
        )

    def append(self, block: int, start: int, end: int) -> None:
        mapping = self._mapping
        if not mapping.has_backing:
            super().append(block, start, end)
            place = self._new[-1][1] - mapping.prefix
            mapping.bitmaps.new(place, all_set=True)
            return
        first = block * mapping.unit
        place, untouched = self.take(block)
        mapping.bitmaps.new(place - mapping.prefix, all_set=False)
        skip, stop = start - first, end - first
        head, tail = skip % mapping.group, -stop % mapping.group
        self._marks.append(
            (place - mapping.prefix, (skip - head) // SECTOR, (stop + tail) // SECTOR)
        )
        self.pieces.append(
            Piece(
                start,
                end - start,
                mapping.file,
                place + skip,
                copy_head=head,
                copy_tail=tail,
                fresh=True,
                reads_zero=untouched,
            )
        )

    def hold(self) -> None:
        """Have room for the bitmaps of new blocks and for the footer behind them: a flush shall not
        be the first to see that there is none."""
        if self._new:
            mapping = self._mapping
            blocks = [place - mapping.prefix for _, place in self._new]
            mapping.file.writev(
                [
                    *((block, mapping.bitmaps.content(block)) for block in blocks),
                    (mapping.appender.end, mapping.footer.pack()),
                ]
            )

    def commit(self) -> None:
        super().commit()
        for block, first, end in self._marks:
            self._mapping.bitmaps.mark(block, first, end)

    def abort(self) -> None:
        for _, place in self._new:
            self._mapping.bitmaps.drop(place - self._mapping.prefix)
        super().abort()
        # The footer may have been written behind what is given back.
        self._mapping.trailer.touch()
