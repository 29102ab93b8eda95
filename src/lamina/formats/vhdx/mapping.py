"""Where guest bytes live in a VHDX image: blocks of 1 to 256 MiB, named by one table.

A differencing image has blocks of which some sectors are in its parent: bitmaps say which. All
changes of tables and bitmaps go through the log: bitmaps first, then the table that makes them
count; data is durable before either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.coalescing import extents_of_units
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt
from lamina.formats.vhdx.bat import TABLE_BYTES, Bat
from lamina.formats.vhdx.bitmaps import Bitmaps
from lamina.formats.vhdx.layout import (
    FULLY_PRESENT,
    NO_GUID,
    NOT_PRESENT,
    OFFSET,
    PARTIALLY_PRESENT,
    READ_ZERO,
    STATE,
    new_guid,
)
from lamina.formats.vhdx.space import Space
from lamina.hints import TYPE_CHECKING
from lamina.units import MIB, PAGE

if TYPE_CHECKING:
    from lamina.block.node import Node, ReadRequest, WriteRequest
    from lamina.engine.disk import Disk
    from lamina.formats.vhdx.opening import Image

_ENTRY = struct.Struct("<Q")


class VhdxMapping(Mapping):
    driver = "vhdx"

    def __init__(self, disk: Disk, image: Image) -> None:
        self.disk = disk
        self.image = image
        self.headers = image.headers
        self.parameters = image.parameters
        self.size = image.parameters.size
        self.unit = image.parameters.block_size
        self.write_unit = image.parameters.logical_sector
        self._unit_bits = self.unit.bit_length() - 1
        self.file: Node = image.file
        self.data_node = self.file
        self.metadata = Metadata(self.file)
        self.bat = Bat(self.metadata, image.bat, self.parameters)
        self.bitmaps = Bitmaps(self.metadata, self.bat, self.parameters)
        self.pages = TableCache(
            self.metadata, table_bytes=PAGE, capacity=MIB, stage=Stage.ROOTS, name="metadata"
        )
        """Of the region tables and the metadata items."""
        self.space = Space(self)
        self._told_of_data = False
        """The DataWriteGuid is a new one."""
        self.regions_moved()
        self.grown()

    @property
    def differencing(self) -> bool:
        return self.parameters.has_parent

    @property
    def stays_allocated(self) -> bool:
        """Blocks stay allocated."""
        return self.parameters.leave_allocated and not self.differencing

    def regions_moved(self) -> None:
        """Where payload cannot be."""
        header = self.headers.current
        spans = [(region.offset, region.offset + region.length) for region in self.image.regions]
        spans.append((header.log_offset, header.log_offset + header.log_length))
        self.regions_and_log = spans
        self._low = max(end for _, end in spans)

    def grown(self) -> None:
        """The file has another length."""
        self.end = self.file.size
        self._high = self.end - self.unit

    def resized(self) -> None:
        """``parameters`` say another size."""
        self.size = self.parameters.size
        self.bat.resized(self.parameters)

    # -- reading ---------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> list[Extent]:
        end = offset + length
        return extents_of_units(offset, end, self._units(offset, end), self.file)

    def _units(self, offset: int, end: int) -> Iterator[tuple[int, Kind, int]]:
        """(guest offset, kind, host offset) of blocks, and of the parts of partial ones."""
        unit = self.unit
        first = offset // unit
        for block, entries in self.bat.entries(first, -(-end // unit) - first):
            for number, entry in enumerate(entries, block):
                start = number * unit
                state = entry & STATE
                if state == FULLY_PRESENT:
                    yield start, Kind.DATA, self.host_offset(number, entry)
                elif state == NOT_PRESENT:
                    yield start, Kind.BELOW, -1
                elif state in READ_ZERO:
                    yield start, Kind.ZERO, -1
                else:
                    host = self.host_offset(number, entry) - start
                    inside = max(start, offset), min(start + unit, end)
                    for begin, _, present in self.sectors(number, *inside):
                        if present:
                            yield begin, Kind.DATA, host + begin
                        else:
                            yield begin, Kind.BELOW, -1

    def sectors(self, block: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether here) of the runs of a partially present block. Guest offsets."""
        sector = self.parameters.logical_sector
        chunk, number = divmod(block, self.bat.ratio)
        base = block * self.unit
        first = (start - base) // sector
        count = -(-(end - base) // sector) - first
        shift = number * self.bitmaps.bits
        bitmap = self.bitmap_place(chunk, block)
        for bit, run, present in self.bitmaps.runs(bitmap, shift + first, count):
            begin = base + (bit - shift) * sector
            yield max(begin, start), min(begin + run * sector, end), present

    def bitmap_place(self, chunk: int, block: int) -> int:
        """Host offset of the bitmap block that a partially present block needs."""
        place = self.bitmaps.host_offset(chunk)
        if not place:
            raise self.corrupt(f"Block {block} is partially present but has no bitmap", block)
        if not self._is_payload(place, MIB):
            raise self.corrupt(f"The sector bitmap at {place} lies outside of the image", block)
        return place

    def host_offset(self, block: int, entry: int) -> int:
        """Where a block with data is. Raises ImageCorrupt for an entry that cannot be."""
        host = entry & OFFSET
        if entry & STATE not in (FULLY_PRESENT, PARTIALLY_PRESENT) or (
            entry & STATE == PARTIALLY_PRESENT and not self.differencing
        ):
            raise self.corrupt(f"VHDX BAT entry {block} has the state {entry & STATE}", block)
        if self._low <= host <= self._high:
            return host
        # The last block of the disk need not be in the file as a whole.
        if not self._is_payload(host, min(self.unit, self.size - block * self.unit)):
            raise self.corrupt(
                f"VHDX BAT entry {block} start offset {host} lies outside of the image", block
            )
        return host

    def _is_payload(self, host: int, length: int) -> bool:
        inside = host >= MIB and host + length <= self.end
        return inside and all(
            host + length <= start or end <= host for start, end in self.regions_and_log
        )

    def corrupt(self, message: str, block: int) -> ImageCorrupt:
        return ImageCorrupt(
            message,
            path=self.file.filename,
            format="vhdx",
            structure="BAT",
            field=f"entry of block {block}",
        )

    def locate(self, requests: Sequence[ReadRequest]) -> list[int]:
        return self._locate(requests)

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int]:
        return self._locate(requests)

    def _locate(self, requests: Sequence[tuple[int, object]]) -> list[int]:
        unit, bits, find, low, high = (
            self.unit,
            self._unit_bits,
            self.bat.tables.find,
            self._low,
            self._high,
        )
        ratio_bits, base = self.bat.ratio_bits, self.bat.offset
        places = []
        for offset, buffer in requests:
            block = offset >> bits
            inside = offset & (unit - 1)
            at = 8 * (block + (block >> ratio_bits))
            table = find(base + at - at % TABLE_BYTES)
            place = -1
            if table is not None and inside + len(buffer) <= unit:  # type: ignore[arg-type]
                entry: int = _ENTRY.unpack_from(table, at % TABLE_BYTES)[0]
                host = entry & OFFSET
                if entry & STATE == FULLY_PRESENT and low <= host <= high:
                    place = host + inside
            places.append(place)
        return places

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        from lamina.formats.vhdx.writing import VhdxReservation

        return VhdxReservation(self, ranges)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        from lamina.formats.vhdx.clearing import clear

        if self.stays_allocated:
            return all(extent.kind is not Kind.DATA for extent in self.resolve(offset, length))
        clear(self, offset // self.unit, length // self.unit, even_absent=True)
        return True

    def discard(self, offset: int, length: int) -> None:
        from lamina.formats.vhdx.clearing import clear

        if not self.stays_allocated:
            clear(self, offset // self.unit, length // self.unit, even_absent=self.differencing)

    # -- the whole -------------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.vhdx.resize import resize

        resize(self, size, preallocation)

    def patch(self, host_offset: int, data: bytes) -> None:
        """Change bytes of the region tables or the metadata items."""
        while data:
            page, skip = divmod(host_offset, PAGE)
            part = data[: PAGE - skip]
            if self.pages.get(page * PAGE)[skip : skip + len(part)] != part:
                self.pages.update(page * PAGE, skip, part)
            host_offset += len(part)
            data = data[len(part) :]

    def info(self) -> NodeInfo:
        from lamina.block.filenames import full_backing_filename

        name = self.image.parent_name
        return NodeInfo(
            self.disk.filename,
            "vhdx",
            self.size,
            self.file.info().actual_size,
            cluster_size=self.unit,
            backing_filename=name,
            full_backing_filename=full_backing_filename(self.disk, name) if name else None,
            backing_format="vhdx" if name else None,
        )

    # -- sessions --------------------------------------------------------------------------------

    def before_first_write(self) -> None:
        self.begin(data=True)

    def begin(self, *, data: bool) -> None:
        """Before the file is changed: new GUIDs, and a log [2.2.2].

        ``data``: what the guest sees will change, and children of this image are told.
        """
        from lamina.formats.vhdx.log import Log, hold

        changes = {}
        if self.metadata.log is None:
            hold(self.file, self.headers.current)
            changes["file_write_guid"] = new_guid()
            changes["log_guid"] = new_guid()
        if data and not self._told_of_data:
            changes["data_write_guid"] = new_guid()
        if not changes:
            return
        self.headers.update(**changes)
        self._told_of_data = self._told_of_data or data
        if self.metadata.log is None:
            self.metadata.log = Log(self.file, self.headers)

    def end_log(self) -> None:
        """Nothing is left to be replayed; what was logged is in place before."""
        if self.metadata.log is not None:
            self.metadata.barrier()
            self.headers.update(log_guid=NO_GUID)
            self.metadata.log = None

    def close(self) -> None:
        self.end_log()
        self._told_of_data = False

    def reopened(self, *, read_only: bool) -> None:
        if read_only:
            return
        from lamina.formats.vhdx.opening import prepare_for_writing

        prepare_for_writing(self.image, self.disk)
        self.file = self.data_node = self.metadata.file = self.image.file
        for cache in (self.bat.tables, self.bitmaps.tables, self.pages):
            cache.node = self.file
            cache.drop_clean()
        self.grown()
