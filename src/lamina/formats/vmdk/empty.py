"""Dropping what a disk holds, so that everything comes from its parent."""

from __future__ import annotations

from lamina.errors import ImageUnsupported
from lamina.formats.vmdk.sparse import SparseExtent
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.vmdk.mapping import VmdkMapping


def make_empty(mapping: VmdkMapping) -> None:
    """Raises ImageUnsupported where grains cannot be taken out.

    What is below is about to be all there is, so this is the disk that it belongs to: its content
    identifier is noted first.
    """
    extents = [extent for extent in mapping.extents if isinstance(extent, SparseExtent)]
    if extents != mapping.extents or any(extent.compressed for extent in extents):
        raise ImageUnsupported("Operation not supported")
    mapping.adopt_parent()
    mapping.metadata.commit()
    mapping.metadata.barrier()
    for extent in extents:
        extent.forget(extent.start, extent.length)
    mapping.metadata.commit()
