"""Opening an image: footer, dynamic header, parent."""

from __future__ import annotations

from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, UsageError
from lamina.formats.vpc import layout
from lamina.formats.vpc.footer import find_footer
from lamina.formats.vpc.geometry import disk_size
from lamina.formats.vpc.layout import FOOTER_SIZE, Footer, Header
from lamina.formats.vpc.mapping import DynamicMapping, FixedMapping, VpcMapping
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.formats.vpc.options import VpcOptions

MODES = (None, "chs", "current_size")


def open_disk(options: VpcOptions, context: OpenContext) -> Disk:
    if options.force_size_calc not in MODES:
        raise UsageError(
            f"Invalid size calculation mode: '{options.force_size_calc}'", field="force_size_calc"
        )
    return Disk(context, lambda disk: _load(disk, options, context))


def _load(disk: Disk, options: VpcOptions, context: OpenContext) -> VpcMapping:
    file = disk.file
    footer, agree = find_footer(file)
    size = disk_size(footer, options.force_size_calc)
    layout.check_size(size)
    if footer.disk_type == layout.FIXED:
        _check_fixed(file, size)
        return FixedMapping(disk, footer, size)
    if footer.disk_type not in (layout.DYNAMIC, layout.DIFFERENCING):
        raise ImageUnsupported(
            f"Unsupported VHD disk type {footer.disk_type}",
            format="vpc",
            structure="footer",
            field="disk_type",
            offset=60,
        )
    header = read_header(file, footer, size)
    name = None
    if footer.disk_type == layout.DIFFERENCING:
        name = _open_parent(disk, header, context)
    mapping = DynamicMapping(disk, footer, size, header, name)
    if not agree:
        mapping.gate = lambda: _repair_footers(mapping)
    return mapping


def read_header(file: Node, footer: Footer, size: int) -> Header:
    """The dynamic header. Raises ImageCorrupt or ImageUnsupported."""
    place = footer.data_offset
    inside = FOOTER_SIZE <= place <= file.size - layout.HEADER_SIZE
    return layout.parse_header(file.read(place, layout.HEADER_SIZE) if inside else b"", size)


def _check_fixed(file: Node, size: int) -> None:
    """The footer lies behind the data: writing to the disk must not destroy it."""
    if size > file.size - FOOTER_SIZE:
        raise ImageCorrupt(
            "block-vpc: The disk is larger than the file. The image has been truncated.",
            path=file.filename,
            format="vpc",
            structure="footer",
            field="current_size",
            offset=file.size - FOOTER_SIZE + 48,
        )


def _repair_footers(mapping: DynamicMapping) -> None:
    """Before the first change: both say what the better one said."""
    mapping.file.write(0, mapping.footer.pack())
    mapping.trailer.touch()


def _open_parent(disk: Disk, header: Header, context: OpenContext) -> str | None:
    """Attach the parent; the name that the image has for it."""
    from lamina.formats.vpc.parent import check_parent, parent_filename

    name = parent_filename(disk.file, header)
    parent = context.open_named("backing", name or "", driver="vpc", relative_to=disk)
    if parent is not None:
        disk.attach("backing", parent)
        check_parent(header, parent)
    elif not (name or context.inspect or "backing" in context.image_option):
        raise ImageCorrupt(
            "This differencing VHD image does not name its parent",
            path=disk.filename,
            format="vpc",
            structure="dynamic header",
            field="parent_locators",
            offset=576,
            hint="Name it with backing.file.filename=…",
        )
    return name
