"""Dropping all data of a differencing image, so that everything comes from its parent again."""

from __future__ import annotations

from lamina.errors import ImageUnsupported
from lamina.formats.vpc.create import write_free
from lamina.formats.vpc.layout import FOOTER_SIZE
from lamina.formats.vpc.mapping import DynamicMapping
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.vpc.mapping import VpcMapping


def make_empty(mapping: VpcMapping) -> None:
    """The table first, then the blocks that it named."""
    if not isinstance(mapping, DynamicMapping):
        raise ImageUnsupported("Operation not supported")
    header, metadata = mapping.header, mapping.metadata
    metadata.commit()
    write_free(mapping.file, header.table_offset, header.table_end)
    mapping.file.flush()
    metadata.barrier()
    mapping.use_header(header)
    mapping.bitmaps.forget()
    mapping.appender.end = mapping.find_end()
    mapping.trailer.touch()
    metadata.commit()
    metadata.barrier()
    mapping.appender.trim(keep=FOOTER_SIZE)
