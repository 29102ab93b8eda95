"""Naming another parent, or none. The header takes two sectors, the footer one: it decides which
header is in effect, so that the id of a parent never stands beside the name of another one.
"""

from __future__ import annotations

from lamina.block.limits import WriteFlags
from lamina.errors import ImageUnsupported
from lamina.formats.vpc.layout import DYNAMIC, FOOTER_SIZE, FREE, Footer, Header
from lamina.formats.vpc.mapping import DynamicMapping
from lamina.formats.vpc.parent import describe, linkage_by_name, locator_names, parent_filename
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.vpc.mapping import VpcMapping


def check_change(mapping: VpcMapping, filename: str | None, format: str | None) -> DynamicMapping:
    """The mapping of an image that may have such a parent. Raises ImageUnsupported for images and
    parents of other kinds, UsageError for names that no locator can hold."""
    if not (isinstance(mapping, DynamicMapping) and mapping.has_backing):
        raise ImageUnsupported("A vpc image without a parent cannot gain one")
    if format not in (None, "vpc"):
        raise ImageUnsupported("The backing file of a vpc image must be one as well")
    if filename:
        locator_names(filename, mapping.disk.filename)
    return mapping


def change_parent(mapping: VpcMapping, filename: str | None, format: str | None) -> None:
    """Name another parent, known by its unique id, or none. Durable on return.

    Raises what ``check_change`` raises, and what opening the parent raises.
    """
    mapping = check_change(mapping, filename, format)
    if filename:
        _name_parent(mapping, filename)
    else:
        _lose_parent(mapping)


def _name_parent(mapping: DynamicMapping, filename: str) -> None:
    image = mapping.disk.filename
    parent = linkage_by_name(mapping.disk, filename)
    mapping.disk.writer.open_gate()
    mapping.metadata.commit()
    place = round_up(mapping.appender.end, SECTOR)
    header, content = describe(mapping.header, parent, filename, image, place)
    _append(mapping, content)
    _switch(mapping, header, mapping.footer)
    mapping.backing_name = parent_filename(mapping.file, header)


def _lose_parent(mapping: DynamicMapping) -> None:
    """A dynamic disk from now on: what is not here reads as zeroes."""
    mapping.disk.writer.open_gate()
    for first, entries in mapping.table.runs(0, mapping.header.max_table_entries):
        for block, entry in enumerate(entries, first):
            if entry != FREE:
                _complete(mapping, mapping.place(block))
                mapping.metadata.relieve()
    mapping.metadata.commit()
    header = replace(
        mapping.header, parent_id=bytes(16), parent_timestamp=0, parent_name="", locators=()
    )
    _switch(mapping, header, replace(mapping.footer, disk_type=DYNAMIC))
    mapping.backing_name = None
    mapping.use_kind()


def _complete(mapping: DynamicMapping, place: int) -> None:
    """A dynamic disk has all of a block: the sectors that are missing are zeroes."""
    block, sectors = place - mapping.prefix, mapping.unit // SECTOR
    bitmaps, file = mapping.bitmaps, mapping.file
    if bitmaps.all_set(block, 0, sectors):
        return
    runs = list(bitmaps.runs(block, 0, sectors))
    for (start, there), (end, _) in zip(runs, [*runs[1:], (sectors, True)], strict=True):
        if not there:
            length = (end - start) * SECTOR
            file.write_zeroes(place + start * SECTOR, length, WriteFlags.MAY_UNMAP)
    mapping.metadata.data_written(file)
    bitmaps.mark(block, 0, sectors)


def _append(mapping: DynamicMapping, content: bytes) -> int:
    """Whole sectors behind everything else: their host offset. Nobody names them yet."""
    place, _ = mapping.appender.take(len(content), SECTOR)
    mapping.file.write(place, content)
    mapping.metadata.data_written(mapping.file)
    mapping.trailer.touch()
    return place


def _switch(mapping: DynamicMapping, header: Header, footer: Footer) -> None:
    """``header`` takes effect elsewhere, together with ``footer``, and has its usual place again
    when nobody needs that."""
    file = mapping.file
    place = _append(mapping, header.pack())
    mapping.publish(replace(footer, data_offset=place))
    mapping.header = header
    file.write(footer.data_offset, header.pack())
    mapping.metadata.data_written(file)
    mapping.publish(footer)
    # Nor does anybody need what named the former parent, if that was there.
    mapping.appender.end = mapping.find_end()
    mapping.trailer.touch()
    mapping.metadata.commit()
    mapping.metadata.barrier()
    mapping.appender.trim(keep=FOOTER_SIZE)
