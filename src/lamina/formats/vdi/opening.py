"""Opening an image, and the parent of a differencing one.

A differencing image knows its parent by UUID alone. Whoever opens it has to name the file, with the
options of ``backing``; what it names is checked against the UUID.
"""

from __future__ import annotations

from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.vdi import layout
from lamina.formats.vdi.mapping import VdiMapping
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node


def open_disk(context: OpenContext) -> Disk:
    return Disk(context, lambda disk: _load(disk, context))


def _load(disk: Disk, context: OpenContext) -> VdiMapping:
    file = disk.file
    header = layout.parse(file.read(0, min(layout.SIZE, file.size)))
    if not context.inspect:
        layout.check_map(header, file.size)
    if header.differencing:
        _open_parent(disk, header, context)
    return VdiMapping(disk, header)


def _open_parent(disk: Disk, header: layout.Header, context: OpenContext) -> None:
    nowhere = "backing" in context.image_option and context.image_option["backing"] is None
    parent = context.open_named("backing", "", driver=None, relative_to=disk)
    if parent is None:
        if context.inspect or nowhere:
            return
        linked = header.uuid_link != layout.NO_UUID
        raise ImageUnsupported(
            f"unsupported VDI image (non-NULL {'link' if linked else 'parent'} UUID)",
            format="vdi",
            structure="header",
            field="uuid_link" if linked else "uuid_parent",
            offset=0x1A8 if linked else 0x1B8,
            hint="This is a differencing image: name its parent with backing.file.filename=…",
        )
    disk.attach("backing", parent)
    _check_parent(header, parent)


def _check_parent(header: layout.Header, parent: Node) -> None:
    """Raises ImageCorrupt if the parent is a VDI image, but another one."""
    layer = parent.unfiltered
    if not isinstance(layer, Disk) or not isinstance(layer.mapping, VdiMapping):
        return
    if layer.mapping.header.uuid_image not in (header.uuid_link, header.uuid_parent):
        raise ImageCorrupt(
            "The backing file is not the parent of this VDI image (its UUID differs)",
            format="vdi",
            structure="header",
            field="uuid_link",
            offset=0x1A8,
        )
