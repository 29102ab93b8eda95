"""Opening an image: the header, its backing file, and a check where the last user crashed."""

from __future__ import annotations

from lamina.engine.disk import Disk
from lamina.formats.qed import layout
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.formats.qed.mapping import QedMapping


def open_disk(context: OpenContext) -> Disk:
    return Disk(context, lambda disk: _load(disk, context))


def _load(disk: Disk, context: OpenContext) -> QedMapping:
    from lamina.formats.qed.mapping import QedMapping

    file = disk.file
    header = layout.parse(file.read(0, min(layout.SIZE, file.size)), file.size)
    name = read_backing_name(file, header)
    # The format of a backing file is not stored, only that it is raw and must not be probed.
    format = "raw" if header.features & layout.NO_PROBE and name else None
    mapping = QedMapping(disk, header, name, format)
    backing = context.open_named("backing", name or "", driver=format, relative_to=disk)
    if backing is not None:
        disk.attach("backing", backing)
    if not (disk.read_only or context.check or context.inspect):
        mapping.repair_after_crash()
    return mapping


def read_backing_name(file: Node, header: layout.Header) -> str | None:
    """What the header names, None for nothing. The header is sound."""
    if not header.features & layout.BACKING_FILE:
        return None
    inside = max(min(header.backing_size, file.size - header.backing_offset), 0)
    name = file.read(header.backing_offset, inside).split(b"\0")[0]
    return name.decode("utf-8", "surrogateescape") or None
