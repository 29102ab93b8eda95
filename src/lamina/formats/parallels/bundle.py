"""A bundle as a disk: the image on top, and what it does not hold from those below. For reading.

The file of the disk is the descriptor; the images are opened by the names that stand there, which
pass the opening policy as the names of backing files do.
"""

from __future__ import annotations

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo, SnapshotInfo
from lamina.engine.blocktable import BlockTable
from lamina.engine.coalescing import append_extent
from lamina.engine.read_only import ReadOnlyMapping
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.parallels.descriptor import MAX_SIZE, Descriptor, Image, parse_descriptor
from lamina.formats.parallels.layout import SIZE
from lamina.formats.parallels.mapping import read_header
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk


class Layer(NamedTuple):
    """One image of the chain. Without a table it is plain."""

    node: Node
    table: BlockTable | None
    unit: int
    scale: int

    def resolve(self, offset: int, end: int) -> list[Extent]:
        """BELOW stands for what this image does not hold; neighbours are not joined."""
        if self.table is None:
            inside = max(min(end, self.node.size), offset)
            found = [Extent(offset, inside - offset, Kind.DATA, self.node, offset)]
            found += [Extent(inside, end - inside, Kind.ZERO)]
            return [one for one in found if one.length]
        unit = self.unit
        first = offset // unit
        found = []
        for index, entries in self.table.runs(first, -(-end // unit) - first):
            for block, entry in enumerate(entries, index):
                start, stop = max(block * unit, offset), min((block + 1) * unit, end)
                if not entry:
                    found.append(Extent(start, stop - start, Kind.BELOW))
                    continue
                place = entry * self.scale
                if not self.table.host_offset < place < self.node.size:
                    raise ImageCorrupt(
                        f"cluster {block} is outside image",
                        path=self.node.filename,
                        format="parallels",
                        structure="BAT",
                        field=f"entry {block}",
                    )
                place += start - block * unit
                found.append(Extent(start, stop - start, Kind.DATA, self.node, place))
        return found


class BundleMapping(ReadOnlyMapping):
    driver = "parallels"

    def __init__(self, disk: Disk, context: OpenContext) -> None:
        super().__init__(disk)
        if self.file.size > MAX_SIZE:
            raise ImageUnsupported(
                f"The disk descriptor is larger than {MAX_SIZE} bytes", format="parallels"
            )
        # The file is padded to whole sectors with zeroes, of which XML knows nothing.
        text = self.file.read(0, self.file.size).rstrip(b"\0")
        self.descriptor: Descriptor = parse_descriptor(text)
        self.size = self.descriptor.sectors * SECTOR
        self._context = context
        self._layers: dict[str, Layer] = {}
        """Of all images that were opened, by GUID."""
        self.layers: list[Layer] = []
        """Those that the disk consists of, topmost first."""
        if context.inspect:
            # Even so it has to hang together.
            self.descriptor.chain(self.descriptor.top)
        else:
            self.show(self.descriptor.top)

    def show(self, guid: str) -> None:
        """Be this state of the disk from now on."""
        self.layers = [self._layer(image) for image in self.descriptor.chain(guid)]

    def _layer(self, image: Image) -> Layer:
        ready = self._layers.get(image.guid)
        if ready is not None:
            return ready
        role = f"image.{image.guid}"
        node = self._context.open_named(role, image.filename, driver=None, relative_to=self.disk)
        if node is None:
            raise ImageUnsupported("The images of a bundle are not open", format="parallels")
        self.disk.attach(role, node)
        if image.plain:
            layer = Layer(node, None, 0, 0)
        else:
            header = read_header(node)
            if (header.size, header.cluster_sectors) != (
                self.size,
                self.descriptor.cluster_sectors,
            ):
                raise ImageCorrupt(
                    "The image and the disk descriptor differ in size",
                    path=node.filename,
                    format="parallels",
                    structure="header",
                    field="nb_sectors",
                    offset=36,
                )
            table = BlockTable(self.metadata, host_offset=SIZE, entries=header.entries, node=node)
            layer = Layer(node, table, header.cluster_size, header.entry_scale)
        self._layers[image.guid] = layer
        return layer

    def resolve(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        self._resolve(0, offset, offset + length, extents)
        return extents

    def _resolve(self, number: int, offset: int, end: int, extents: list[Extent]) -> None:
        """What layer ``number`` and those below it hold of a range."""
        if number == len(self.layers):
            append_extent(extents, Extent(offset, end - offset, Kind.ZERO))
            return
        below = offset
        for extent in self.layers[number].resolve(offset, end):
            if extent.kind is Kind.BELOW:
                continue
            if below < extent.guest_offset:
                self._resolve(number + 1, below, extent.guest_offset, extents)
            append_extent(extents, extent)
            below = extent.end
        if below < end:
            self._resolve(number + 1, below, end, extents)

    def info(self) -> NodeInfo:
        descriptor = self.descriptor
        snapshots = [
            SnapshotInfo(guid, guid, 0, 0, 0, 0, 0)
            for guid in descriptor.parents
            if guid != descriptor.top
        ]
        sizes = [self.file.info().actual_size]
        sizes += [layer.node.info().actual_size for layer in self._layers.values()]
        known = [size for size in sizes if size is not None]
        return NodeInfo(
            self.disk.filename,
            "parallels",
            self.size,
            sum(known) if len(known) == len(sizes) else None,
            dirty=None,
            snapshots=snapshots,
        )
