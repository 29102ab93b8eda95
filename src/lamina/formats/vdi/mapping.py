"""Where guest bytes live in a VDI image: a map of blocks that are appended as they are needed.

Block ``p`` of the file is at ``offset_data + p * 1 MiB``; the header counts how many there are.
Data is written first, then the count, then the map entry, with a flush before the map: after a
crash there may be a block that nobody names, never an entry that names nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.extents import Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.appending import Appender
from lamina.engine.blocktable import BlockMapping, BlockTable
from lamina.engine.mapping import Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.errors import ImageCorrupt
from lamina.formats.vdi.layout import ALLOCATED_OFFSET, BLOCK, FREE, STATIC, ZERO, Header
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace
from lamina.units import PAGE

if TYPE_CHECKING:
    from lamina.engine.disk import Disk


class VdiMapping(BlockMapping):
    driver = "vdi"
    unit = block_bytes = scale = BLOCK
    zero_entry = ZERO
    discard_unit = PAGE

    def __init__(self, disk: Disk, header: Header) -> None:
        """Of a header that is sound."""
        self.disk = disk
        self.file = self.data_node = disk.file
        self.header = header
        self.size = header.disk_size
        self.metadata = Metadata(self.file)
        self.has_backing = header.differencing
        self.fixed = header.image_type == STATIC
        self.write_unit = 0 if self.has_backing else PAGE
        # Without a parent, what is free is zero for certain: there is nothing below.
        self.special = {FREE: Kind.BELOW if self.has_backing else Kind.ZERO, ZERO: Kind.ZERO}
        self.use_header(header)

    def use_header(self, header: Header) -> None:
        """Take places from ``header``; nothing is dirty."""
        self.header = header
        self.size = header.disk_size
        self.base = header.offset_data
        self.table = BlockTable(
            self.metadata,
            host_offset=header.offset_bmap,
            entries=header.blocks_in_image,
            name="block map",
        )
        self._end_known = False
        end = header.offset_data + header.blocks_allocated * BLOCK
        self.appender = Appender(self.file, end, limit=header.offset_data + ZERO * BLOCK)

    @property
    def limit(self) -> int:
        """No entry of the map is as large: there are at most as many blocks as the disk has, or as
        are in the file, with what a crash left there."""
        in_file = -(-(self.file.size - self.base) // BLOCK)
        return max(self.header.blocks_in_image, min(self.header.blocks_allocated, in_file))

    def check_places(self, block: int, lowest: int, highest: int) -> None:
        index = (highest - self.base) // BLOCK
        if index >= self.header.blocks_in_image and index >= self.limit:
            raise ImageCorrupt(
                f"block index {block} too large, is {index}",
                path=self.file.filename,
                format="vdi",
                structure="block map",
                field=f"entry {block}",
                offset=self.table.host_offset + 4 * block,
            )

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        if not self._end_known:
            self.find_end()
        return super().reserve(ranges)

    def find_end(self) -> None:
        """New blocks go behind all that the map names, whatever the header counts."""
        self.appender.end = self.base + (self.table.highest(self.special) + 1) * BLOCK
        self._end_known = True

    def added(self, block: int, host_offset: int) -> None:
        count = (self.appender.end - self.base) // BLOCK
        if count != self.header.blocks_allocated:
            self.set_allocated(count, Stage.COUNTS)

    def set_allocated(self, count: int, stage: Stage) -> None:
        """The header's count of blocks: up before entries name them, down after."""
        self.header = replace(self.header, blocks_allocated=count)
        self.metadata.put(stage, ALLOCATED_OFFSET, count.to_bytes(4, "little"))

    def close(self) -> None:
        if self._end_known:
            self.appender.trim()

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.vdi.resize import resize

        resize(self, size, preallocation)

    def info(self) -> NodeInfo:
        header = self.header
        specific: dict[str, Any] | None = None
        if header.differencing:
            from uuid import UUID

            parent = header.uuid_link if any(header.uuid_link) else header.uuid_parent
            specific = {"parent-uuid": str(UUID(bytes_le=parent))}
        return NodeInfo(
            self.disk.filename,
            "vdi",
            self.size,
            self.file.info().actual_size,
            cluster_size=BLOCK,
            specific=specific,
        )
