"""Dropping all guest data, so that everything comes from the backing file again."""

from __future__ import annotations

from lamina.formats.qcow2.allocation import Cause
from lamina.formats.qcow2.resize import cut_tail, unmap
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def make_empty(mapping: Qcow2Mapping) -> None:
    """Every guest cluster becomes unallocated; VM state behind the disk goes with it.

    The tables are changed first, then counts go down, then the file is cut: whatever stops this on
    its way leaves a good image.
    """
    mapping.before_first_write()
    mapping.file.event("empty_image_prepare")
    tables = mapping.tables
    # Nothing is cut off a data file: it has to be told what is not needed.
    cause = Cause.SNAPSHOT if mapping.space.external else Cause.OTHER
    unmap(mapping, 0, len(tables.l1) << tables.l2_bits, cause)
    mapping.metadata.commit(counts=True)
    mapping.metadata.barrier()
    cut_tail(mapping)
