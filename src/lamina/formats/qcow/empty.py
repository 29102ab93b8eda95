"""Dropping all guest data, so that everything comes from the backing file again."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.qcow.mapping import QcowMapping


def make_empty(mapping: QcowMapping) -> None:
    """Forget all data: the L1 table first, then what it named."""
    start, length = mapping.header.l1_offset, 8 * mapping.header.l1_entries
    mapping.metadata.commit()
    mapping.file.write_zeroes(start, length)
    mapping.file.flush()
    mapping.metadata.barrier()
    for cache in (mapping.l1_chunks, mapping.l2_tables):
        cache.drop_clean()
    mapping.end = start + length
    mapping.file.truncate(mapping.end)
