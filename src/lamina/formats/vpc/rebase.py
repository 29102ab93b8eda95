"""Naming another parent. The header takes two sectors, the footer one: it decides which header is
in effect, so that the id of a parent never stands beside the name of another one.
"""

from __future__ import annotations

from lamina.errors import ImageUnsupported
from lamina.formats.vpc.layout import FOOTER_SIZE, HEADER_SIZE, Header
from lamina.formats.vpc.mapping import DynamicMapping
from lamina.formats.vpc.parent import describe, linkage_by_name, locator_names, parent_filename
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.vpc.mapping import VpcMapping


def change_parent(mapping: VpcMapping, filename: str | None, format: str | None) -> None:
    """Name another parent, known by its unique id. Durable on return.

    Raises ImageUnsupported for images and parents of other kinds, UsageError for names that no
    locator can hold, and what opening the parent raises.
    """
    if not (isinstance(mapping, DynamicMapping) and mapping.has_backing and filename):
        raise ImageUnsupported("A vpc image cannot gain or lose its parent")
    if format not in (None, "vpc"):
        raise ImageUnsupported("The backing file of a vpc image must be one as well")
    image = mapping.disk.filename
    locator_names(filename, image)
    parent = linkage_by_name(mapping.disk, filename)
    mapping.disk.writer.open_gate()
    mapping.metadata.commit()
    place = round_up(mapping.appender.end, SECTOR)
    header, content = describe(mapping.header, parent, filename, image, place)
    _append(mapping, content)
    _switch(mapping, header)
    mapping.backing_name = parent_filename(mapping.file, header)


def _append(mapping: DynamicMapping, content: bytes) -> int:
    """Whole sectors behind everything else: their host offset. Nobody names them yet."""
    place, _ = mapping.appender.take(len(content), SECTOR)
    mapping.file.write(place, content)
    mapping.metadata.data_written(mapping.file)
    mapping.trailer.touch()
    return place


def _switch(mapping: DynamicMapping, header: Header) -> None:
    """``header`` takes effect elsewhere, and has its usual place again when nobody needs that."""
    footer, file = mapping.footer, mapping.file
    place = _append(mapping, header.pack())
    mapping.publish(replace(footer, data_offset=place))
    mapping.header = header
    file.write(footer.data_offset, header.pack())
    mapping.metadata.data_written(file)
    mapping.publish(footer)
    mapping.appender.give_back(place, place + HEADER_SIZE)
    mapping.trailer.touch()
    mapping.metadata.commit()
    mapping.metadata.barrier()
    mapping.appender.trim(keep=FOOTER_SIZE)
