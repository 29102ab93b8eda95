"""From a file, and what it names, to the extents of a disk."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.errors import ImageCorrupt, LaminaError, Refused
from lamina.formats.vmdk import descriptor as descriptors
from lamina.formats.vmdk import layout
from lamina.formats.vmdk.descriptor import (
    FLAT,
    MAX_SIZE,
    SE_SPARSE,
    SPARSE,
    VMFS,
    VMFS_SPARSE,
    ZERO,
    Descriptor,
    ExtentLine,
)
from lamina.formats.vmdk.extents import FlatExtent, NoAccessExtent, VmdkExtent, ZeroExtent
from lamina.formats.vmdk.layout import LINE_ENDINGS_VALID, MARKERS, TRAILER_SIZE, SparseHeader
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.engine.metadata import Metadata

_COWD = b"COWD"


class Source:
    """The file of an image, looked at once: what its beginning is, and its descriptor."""

    header: SparseHeader | None = None
    """Of a file that is the only extent itself."""

    def __init__(self, file: Node) -> None:
        """Raises ImageCorrupt, ImageUnsupported, StorageError."""
        self.file = file
        head = file.read(0, min(SECTOR, file.size))
        self.is_cowd = head.startswith(_COWD)
        self.descriptor_offset = 0
        """Where the text is in the file."""
        self.descriptor_room = 0
        """Bytes that it may take; 0: as many as it likes."""
        if self.is_cowd:
            self.descriptor = _made_up(file, "vmfsSparse", VMFS_SPARSE)
            return
        if not head.startswith(layout.MAGIC):
            self.descriptor = descriptors.parse_bytes(file.read(0, min(file.size, MAX_SIZE)))
            descriptors.check_stand_alone(self.descriptor)
            return
        header = layout.parse_header(head)
        self.descriptor_offset = header.descriptor_offset
        self.descriptor_room = min(header.descriptor_size, MAX_SIZE)
        self.descriptor = self._embedded()
        if not header.capacity:
            # Everything is in the descriptor.
            descriptors.check_stand_alone(self.descriptor)
            return
        self.header = header

    def _embedded(self) -> Descriptor:
        offset = self.descriptor_offset
        inside = max(min(self.descriptor_room, self.file.size - offset), 0) if offset else 0
        try:
            return descriptors.parse_bytes(self.file.read(offset, inside))
        except LaminaError as error:
            error.path, error.offset = self.file.filename, offset
            raise


def _made_up(file: Node, create_type: str, type: str) -> Descriptor:
    """For images that have none."""
    line = ExtentLine("RW", SECTOR, type, "extent")
    return replace(descriptors.compose(create_type, [line]), cid=0)


def open_extents(
    disk: Disk, source: Source, metadata: Metadata, context: OpenContext, *, backed: bool
) -> list[VmdkExtent]:
    """In the order of their guest bytes, which adjoin. Raises what opening raises."""
    writable = not disk.read_only
    if source.is_cowd:
        return [_cowd(0, source.file)]
    if source.header is not None:
        extent = open_sparse(
            0, source.file, source.header, metadata, format="", writable=writable, backed=backed
        )
        return [extent]
    extents: list[VmdkExtent] = []
    nodes: dict[str, Node | None] = {}
    start = 0
    for number, line in enumerate(source.descriptor.extents):
        node = None
        if line.access != "NOACCESS" and line.type != ZERO:
            if line.name not in nodes:
                nodes[line.name] = _open_part(disk, context, number, line)
            elif line.type not in (FLAT, VMFS):
                raise ImageCorrupt(
                    f"Several extents are in the file '{line.name}'",
                    format="vmdk",
                    structure="descriptor",
                    field="extents",
                )
            node = nodes[line.name]
        extent = extent_of_line(start, line, node, metadata, writable=writable, backed=backed)
        extents.append(extent)
        start = extent.end
    for extent in extents[:-1]:
        extent.is_last = False
    return extents


def _open_part(
    disk: Disk, context: OpenContext, number: int, line: ExtentLine
) -> Node | None:
    """The file of an extent; None where nothing is to be opened."""
    role = f"extents.{number}"
    node = context.open_named(role, line.name, driver=None, relative_to=disk, part=True)
    if node is not None:
        disk.attach(role, node)
    return node


def extent_of_line(
    start: int,
    line: ExtentLine,
    node: Node | None,
    metadata: Metadata,
    *,
    writable: bool,
    backed: bool,
) -> VmdkExtent:
    """``node``: the file that the line names, opened. Raises ImageCorrupt, ImageUnsupported."""
    if line.type == ZERO:
        return ZeroExtent(start, line.length)
    if node is None:
        return NoAccessExtent(start, line)
    writable = writable and line.access == "RW"
    if line.type in (FLAT, VMFS):
        return FlatExtent(
            start, line.length, node, host_offset=line.offset, format=line.type, writable=writable
        )
    if line.type == VMFS_SPARSE:
        return _cowd(start, node)
    if line.type == SE_SPARSE:
        return _se_sparse(start, node)
    assert line.type == SPARSE
    header = layout.parse_header(node.read(0, min(SECTOR, node.size)))
    if not header.capacity:
        raise ImageCorrupt(
            "The extent is empty",
            path=node.filename,
            format="vmdk",
            structure="header",
            field="capacity",
            offset=12,
        )
    return open_sparse(
        start, node, header, metadata, format=SPARSE, writable=writable, backed=backed
    )


def open_sparse(
    start: int,
    node: Node,
    header: SparseHeader,
    metadata: Metadata,
    *,
    format: str,
    writable: bool,
    backed: bool,
) -> VmdkExtent:
    """Raises ImageCorrupt, ImageUnsupported."""
    from lamina.formats.vmdk.sparse import SparseExtent
    from lamina.formats.vmdk.stream import StreamExtent

    if header.overhead > node.size:
        raise ImageCorrupt(
            f"File truncated, expecting at least {header.overhead} bytes",
            path=node.filename,
            format="vmdk",
            structure="header",
            field="overHead",
            offset=64,
        )
    footer = header.directory_offset < 0
    if footer:
        header = _with_footer(node, header)
    stream = header.compressed and header.flags & MARKERS and not header.has_redundant
    extent = (StreamExtent if stream else SparseExtent)(
        start, node, header, metadata, format=format, writable=writable, backed=backed
    )
    if isinstance(extent, StreamExtent):
        extent.footer = footer
    else:
        extent.sealed = footer
    return extent


def _with_footer(node: Node, header: SparseHeader) -> SparseHeader:
    """The header with the place of its directory, which the footer knows."""
    start = max(node.size // SECTOR * SECTOR - TRAILER_SIZE, 0)
    footer = layout.parse_footer(node.read(start, min(TRAILER_SIZE, node.size - start)))
    same = ("capacity", "grain", "table_entries", "compression")
    if any(getattr(header, name) != getattr(footer, name) for name in same):
        raise ImageCorrupt(
            "Invalid footer", path=node.filename, format="vmdk", structure="footer", offset=start
        )
    flags = header.flags | LINE_ENDINGS_VALID
    return replace(header, flags=flags, directory_offset=footer.directory_offset)


def _cowd(start: int, node: Node) -> VmdkExtent:
    from lamina.formats.vmdk.cowd import HEADER_SIZE, CowdExtent, parse_header

    return CowdExtent(start, node, parse_header(node.read(0, min(HEADER_SIZE, node.size))))


def _se_sparse(start: int, node: Node) -> VmdkExtent:
    from lamina.formats.vmdk.sesparse import HEADER_SIZE, SeSparseExtent, parse_header

    return SeSparseExtent(start, node, parse_header(node.read(0, min(HEADER_SIZE, node.size))))


def check_writable(disk: Disk, extents: Sequence[VmdkExtent]) -> None:
    """Raises Refused if the disk is to be writable and cannot be, and may not fall back to reading.
    """
    if disk.read_only:
        return
    try:
        for extent in extents:
            extent.check_writable()
    except Refused:
        if not disk.options.auto_read_only:
            raise
        disk.read_only = True
        for extent in extents:
            extent.writable = False


def allocation_unit(extents: Sequence[VmdkExtent], size: int) -> int:
    """Of a disk of these extents: what all grains meet at the multiples of. Where they do not, the
    unit is the whole disk, and one change excludes all others."""
    grains = [extent.grain for extent in extents if extent.grain]
    unit = max(grains, default=SECTOR)
    if all(extent.start % unit == 0 for extent in extents if extent.grain):
        return unit
    return round_up(size, unit)
