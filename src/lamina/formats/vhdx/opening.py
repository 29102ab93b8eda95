"""Opening an image: headers, log, regions, metadata, parent; in this order, as each finds the next.
"""

from __future__ import annotations

from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.vhdx import locator
from lamina.formats.vhdx.headers import Headers
from lamina.formats.vhdx.layout import (
    BAT_REGION,
    FILE_SIGNATURE,
    FULLY_PRESENT,
    METADATA_REGION,
    NO_GUID,
    OFFSET,
    PARTIALLY_PRESENT,
    REGION_TABLE_BYTES,
    REGION_TABLE_OFFSETS,
    STATE,
    Region,
    check_apart,
    check_log,
    new_guid,
    parse_regions,
)
from lamina.formats.vhdx.metadata import (
    METADATA_TABLE_BYTES,
    PARENT_LOCATOR,
    Item,
    Parameters,
    parse_items,
    parse_parameters,
)
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.mapping import Mapping
    from lamina.formats.vhdx.mapping import VhdxMapping

_CHECKED_ENTRIES = 1 << 20
"""Of the BAT: so many are looked at when an image is opened, more of them when they are used."""


@dataclass
class Image:
    """What the structures in front of the BAT say."""

    file: Node
    """The file, or what it will be once its log has been replayed."""
    headers: Headers
    regions: list[Region]
    items: dict[bytes, Item]
    parameters: Parameters
    parent: dict[str, str]
    """The parent locator."""
    parent_name: str | None = None
    good_tables: tuple[bool, bool] = (True, True)
    """Which of the region tables are valid and say the same as the one in use."""
    replayed: bool = False
    """A log was carried out, or has to be."""

    @property
    def bat(self) -> Region:
        return next(region for region in self.regions if region.guid == BAT_REGION)

    @property
    def metadata(self) -> Region:
        return next(region for region in self.regions if region.guid == METADATA_REGION)

    def item_offset(self, name: bytes) -> int:
        """Host offset of a metadata item."""
        return self.metadata.offset + self.items[name].offset


def open_disk(context: OpenContext) -> Disk:
    return Disk(context, lambda disk: _load(disk, context))


def _load(disk: Disk, context: OpenContext) -> Mapping:
    from lamina.formats.vhdx.mapping import VhdxMapping

    try:
        image = read_image(disk.file, writable=not disk.read_only)
        mapping = VhdxMapping(disk, image)
        if not context.check:
            _check_places(mapping, writable=not disk.read_only)
        if image.parameters.has_parent:
            from lamina.formats.vhdx.parent import open_parent

            open_parent(disk, image, context)
    except LaminaError as error:
        error.path = error.path or disk.file.filename
        raise
    return mapping


def read_image(file: Node, *, writable: bool) -> Image:
    """``writable``: a log that is not empty is carried out in the file, otherwise in memory."""
    if file.read(0, min(8, file.size)) != FILE_SIGNATURE:
        raise ImageCorrupt(
            "Image not in VHDX format", format="vhdx", structure="file identifier", offset=0
        )
    headers = Headers(file)
    replayed = False
    check_log(headers.current, file.size, used=writable)
    if headers.current.log_guid != NO_GUID:
        file, replayed = _replay(file, headers, writable=writable)
    regions, good_tables = _regions(file)
    header = headers.current
    spans = [(region.offset, region.offset + region.length) for region in regions]
    if writable or replayed:
        check_apart([*spans, (header.log_offset, header.log_offset + header.log_length)])
    image = Image(file, headers, regions, {}, Parameters(0, 1), {})
    image.good_tables, image.replayed = good_tables, replayed
    _read_metadata(image)
    needed = 8 * image.parameters.bat_entries
    bat = image.bat
    if needed > bat.length or bat.offset + needed > file.size:
        raise ImageCorrupt(
            f"The VHDX BAT is too short for its {image.parameters.bat_entries} entries",
            format="vhdx",
            structure="region table",
            field="Length",
        )
    return image


def prepare_for_writing(image: Image, disk: Disk) -> None:
    """An image that was opened read-only will be written to."""
    header = image.headers.current
    check_log(header, disk.file.size, used=True)
    spans = [(region.offset, region.offset + region.length) for region in image.regions]
    check_apart([*spans, (header.log_offset, header.log_offset + header.log_length)])
    if image.file is not disk.file:
        _replay(disk.file, image.headers, writable=True)
        image.file = disk.file


def _replay(file: Node, headers: Headers, *, writable: bool) -> tuple[Node, bool]:
    """The file with its log carried out, and whether there was anything to do."""
    from lamina.formats.vhdx.replay import Pending, ReplayedFile

    pending = Pending(file, headers.current)
    if not pending.entries:
        return file, False
    if not writable:
        return ReplayedFile(file, pending), True
    for _ in pending.changes():
        pass  # Nothing is written before all of it is known to be sane.
    headers.update(file_write_guid=new_guid())
    pending.carry_out()
    headers.update(log_guid=NO_GUID)
    return file, True


def _regions(file: Node) -> tuple[list[Region], tuple[bool, bool]]:
    """Of the first valid table; and which of the two agree with it."""
    tables: list[list[Region] | None] = []
    failure: LaminaError | None = None
    for offset in REGION_TABLE_OFFSETS:
        length = max(min(REGION_TABLE_BYTES, file.size - offset), 0)
        try:
            tables.append(parse_regions(file.read(offset, length)))
        except LaminaError as error:
            error.offset = offset if error.offset is None else error.offset
            failure = failure or error
            tables.append(None)
    found = tables[0] or tables[1]
    if found is None:
        assert failure is not None
        raise failure
    return found, (tables[0] == found, tables[1] == found)


def _read_metadata(image: Image) -> None:
    file, region = image.file, image.metadata
    inside = max(min(METADATA_TABLE_BYTES, file.size - region.offset), 0)
    image.items = parse_items(file.read(region.offset, inside), region.length)
    content = {}
    for name, item in image.items.items():
        start = region.offset + item.offset
        if start + item.length <= file.size:
            content[name] = file.read(start, item.length)
    image.parameters = parse_parameters(content)
    if image.parameters.has_parent:
        image.parent = locator.parse(content[PARENT_LOCATOR])
        image.parent_name = locator.filenames(image.parent)[0]


# -- blocks ----------------------------------------------------------------------------------------


def _check_places(mapping: VhdxMapping, *, writable: bool) -> None:
    """A file that was cut is refused; one that lacks but the end of a block is made longer."""
    bat, size = mapping.bat, mapping.end
    if bat.count > _CHECKED_ENTRIES:
        return
    needed = size
    for first, entries in bat.everything():
        if max(entries, default=0) <= max(size - mapping.unit, 0):
            continue
        for number, entry in enumerate(entries, first):
            if entry & STATE not in (FULLY_PRESENT, PARTIALLY_PRESENT) or bat.is_bitmap(number):
                continue
            start = entry & OFFSET
            block = bat.block_of(number)
            end = start + min(mapping.unit, mapping.size - block * mapping.unit)
            needed = max(needed, end)
            if start >= size or (end > size and not writable):
                what, place = ("start", start) if start >= size else ("end", end - 1)
                raise ImageCorrupt(
                    f"VHDX BAT entry {number} {what} offset {place} points after end of file "
                    f"({size}). Image has probably been truncated.",
                    format="vhdx",
                    structure="BAT",
                    field=f"entry {number}",
                    offset=bat.offset + 8 * number,
                )
    if needed > size:
        mapping.file.truncate(needed)
        mapping.grown()
