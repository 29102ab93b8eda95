"""The image below a differencing image: opening it, naming another one, taking everything from it.
"""

from __future__ import annotations

import errno
import struct

from lamina.block.filenames import full_backing_filename
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, StorageError
from lamina.formats.vhdx import locator
from lamina.formats.vhdx.clearing import clear
from lamina.formats.vhdx.headers import Headers
from lamina.formats.vhdx.layout import FILE_SIGNATURE, NOT_PRESENT, guid_text
from lamina.formats.vhdx.metadata import METADATA_TABLE_BYTES, PARENT_LOCATOR, Item, items_end
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.formats.vhdx.mapping import VhdxMapping
    from lamina.formats.vhdx.opening import Image

_STEP = 1 << 17
"""Blocks whose entries are changed before memory may be relieved."""


def open_parent(disk: Disk, image: Image, context: OpenContext) -> None:
    """Attach the first parent of those named that is there. Raises what opening it raises."""
    names = locator.filenames(image.parent)
    for name in names:
        try:
            parent = context.open_named("backing", name, driver="vhdx", relative_to=disk)
        except LaminaError as error:
            if error.errno != errno.ENOENT or name == names[-1]:
                raise
            continue
        image.parent_name = name
        if parent is not None:
            disk.attach("backing", parent)
            chosen = any(key.partition(".")[0] == "backing" for key in context.image_option)
            if not (chosen or context.check):
                check_linkage(image, parent)
        return


def data_write_guid(node: Node) -> bytes | None:
    """Of a VHDX image, below whatever filters; None for other formats."""
    from lamina.formats.vhdx.mapping import VhdxMapping

    below = node.unfiltered
    if isinstance(below, Disk) and isinstance(below.mapping, VhdxMapping):
        return below.mapping.headers.current.data_write_guid
    return None


def check_linkage(image: Image, parent: Node) -> None:
    """Raises ImageCorrupt if the parent is not what it was when this image was made."""
    found = data_write_guid(parent)
    expected = locator.linkages(image.parent)
    if found is not None and found not in expected:
        raise ImageCorrupt(
            f"The parent '{parent.filename}' has changed since this image was made: its data are "
            f"{guid_text(found)}, not {guid_text(expected[0])}",
            format="vhdx",
            structure="parent locator",
            field=locator.LINKAGE,
            hint="If its content is the same nevertheless, 'rebase -u' links to it again.",
        )


# -- another parent --------------------------------------------------------------------------------


def check_change(mapping: VhdxMapping, format: str | None) -> None:
    """Raises ImageUnsupported for images and parents of other kinds."""
    if not mapping.differencing:
        raise ImageUnsupported("A vhdx image without a parent cannot gain one")
    if format not in (None, "vhdx"):
        raise ImageUnsupported("The backing file of a vhdx image must be one as well")


def change_parent(mapping: VhdxMapping, filename: str | None, format: str | None) -> None:
    """Name another parent, known by what it holds now, or none. Durable on return.

    Raises what ``check_change`` raises, and what opening the parent raises.
    """
    check_change(mapping, format)
    if not filename:
        from lamina.formats.vhdx.detaching import lose_parent

        lose_parent(mapping)
        return
    full = full_backing_filename(mapping.disk, filename)
    file = mapping.disk.context.open_child(
        "parent", node_options=NodeOptions(read_only=True, force_share=True), filename=full
    )
    try:
        if file.read(0, min(8, file.size)) != FILE_SIGNATURE:
            raise ImageUnsupported("The backing file of a vhdx image must be one as well")
        guid = Headers(file).current.data_write_guid
    finally:
        file.close_unused()
    write_locator(mapping, locator.for_parent(filename, guid))
    mapping.image.parent_name = locator.filenames(mapping.image.parent)[0]


def write_locator(mapping: VhdxMapping, entries: dict[str, str]) -> None:
    """Behind all other items, over the old one: the log makes that one change."""
    image = mapping.image
    data = locator.pack(entries)
    others = [item for name, item in image.items.items() if name != PARENT_LOCATOR]
    offset = max((item.offset + item.length for item in others), default=METADATA_TABLE_BYTES)
    item = replace(image.items[PARENT_LOCATOR], offset=round_up(offset, 8), length=len(data))
    if item.offset + item.length > image.metadata.length:
        raise StorageError.from_errno(errno.ENOSPC)
    mapping.begin(data=False)
    # So that what follows is one entry of the log.
    mapping.metadata.commit()
    _, at = read_item_table(image, image.items[PARENT_LOCATOR])
    mapping.patch(image.metadata.offset + at + 16, struct.pack("<II", item.offset, item.length))
    mapping.patch(image.metadata.offset + item.offset, data)
    image.items[PARENT_LOCATOR], image.parent = item, entries
    mapping.metadata.commit()
    mapping.metadata.barrier()


def read_item_table(image: Image, item: Item) -> tuple[bytearray, int]:
    """The used part of the metadata table as it is in the file, and where in it an item is."""
    table = bytearray(image.file.read(image.metadata.offset, METADATA_TABLE_BYTES))
    del table[items_end(table) :]
    return table, table.index(item.pack())


def make_empty(mapping: VhdxMapping) -> None:
    """Take everything from the parent, as it is now."""
    if not mapping.differencing:
        raise ImageUnsupported("Operation not supported")
    bat = mapping.bat
    for block in range(0, bat.blocks, _STEP):
        count = min(_STEP, bat.blocks - block)
        clear(mapping, block, count, even_absent=True, state=NOT_PRESENT)
        mapping.metadata.relieve()
    # No block may be without the bitmap that it needs, not even in a part of a commit.
    mapping.metadata.commit()
    mapping.space.free_later(mapping.bitmaps.drop(range(bat.chunks)))
    parent = mapping.disk.backing
    guid = None if parent is None else data_write_guid(parent)
    if guid is not None:
        entries = {**mapping.image.parent, locator.LINKAGE: f"{{{guid_text(guid)}}}"}
        write_locator(mapping, entries)
    mapping.metadata.commit()
    mapping.metadata.barrier()
