"""Refcounts of another width: the refcount structure written anew, wider or narrower.

The new table and its blocks come to lie behind everything that is in use, and count the old ones as
well. One write of a part of the header's first sector names them and says how wide they are, so
that a power cut leaves the one structure or the other; giving the old one back is the last step.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from lamina.errors import Refused
from lamina.formats.qcow2.allocation import Freed
from lamina.formats.qcow2.arrays import Counts, read_words
from lamina.formats.qcow2.layout import REFTABLE_OFFSET_MASK
from lamina.formats.qcow2.preallocation import end_of_file
from lamina.formats.qcow2.refblock import Width
from lamina.formats.qcow2.repair import REFCOUNT_TABLE_FIELDS, write_structure
from lamina.formats.qcow2.stored import StoredCounts
from lamina.hints import TYPE_CHECKING
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping

END_OF_REFCOUNT_ORDER = 100
"""Offset of the header's field behind refcount_order, the last one that is written."""


def change_width(mapping: Qcow2Mapping, bits: int, progress: Callable[[float], None]) -> None:
    """Keep refcounts of ``bits`` bits from now on. Durable on return.

    Raises Refused, and changes nothing, if a count is too high for them.
    """
    header, file, metadata = mapping.header, mapping.file, mapping.metadata
    order = bits.bit_length() - 1
    if order == header.refcount_order:
        return
    metadata.commit(counts=True)
    metadata.barrier()
    entries = header.refcount_table_clusters << (header.cluster_bits - 3)
    old_table = read_words(file, header.refcount_table_offset, entries)
    old_table &= np.uint64(REFTABLE_OFFSET_MASK)
    for index in np.flatnonzero(old_table & np.uint64(mapping.cluster_size - 1)).tolist():
        # Refuses what cannot be a block.
        mapping.refcounts.block_offset(index)
    clusters = entries * 8 // mapping.cluster_size
    old = [Freed(header.refcount_table_offset >> header.cluster_bits, clusters)]
    old += [Freed(place >> header.cluster_bits, 1) for place in old_table[old_table != 0].tolist()]

    stored = _Stored(StoredCounts(file, header, old_table), bits, progress)
    end = max(mapping.allocator.last_used() + 1, end_of_file(mapping) >> header.cluster_bits)
    table, offset, _ = write_structure(file, header, order, end, stored.of_block)
    new = replace(
        header,
        refcount_order=order,
        refcount_table_offset=offset,
        refcount_table_clusters=len(table) * 8 >> header.cluster_bits,
    )
    fields = new.pack()[REFCOUNT_TABLE_FIELDS:END_OF_REFCOUNT_ORDER]
    file.write(REFCOUNT_TABLE_FIELDS, fields)
    file.flush()
    header.refcount_order = new.refcount_order
    header.refcount_table_offset = new.refcount_table_offset
    header.refcount_table_clusters = new.refcount_table_clusters

    mapping.reload()
    mapping.refcounts.table = array("Q", table.tobytes())
    mapping.allocator.free_later(old)
    metadata.commit(counts=True)
    metadata.barrier()
    progress(1.0)


class _Stored:
    """The counts that the image keeps, block by block of the new structure."""

    def __init__(
        self, stored: StoredCounts, bits: int, progress: Callable[[float], None]
    ) -> None:
        """Raises Refused if a count does not fit into so many bits."""
        self._stored = stored
        self._progress = progress
        self._end = len(stored.table) * stored.per_block
        self._piece: tuple[int, Counts] = (0, np.zeros(0, dtype=np.uint16))
        """The first cluster of the piece that was read last, and its counts."""
        maximum = Width(bits.bit_length() - 1).maximum
        for run in stored.runs(0, self._end):
            if run.counts is None or int(run.counts.max()) <= maximum:
                continue
            index = int(np.argmax(run.counts > maximum))
            offset = (run.first + index) * stored.block_bytes
            raise Refused(
                f"Cannot decrease refcount entry width to {bits} bits: Cluster at offset "
                f"{offset:#x} has a refcount of {run.counts[index]}",
                format="qcow2",
                structure="refcount block",
                offset=offset,
            )

    def of_block(self, first: int, end: int) -> Counts | None:
        """``repair.CountsOf``. The number of clusters is a power of two, like that of old blocks:
        one is a part of the other."""
        length = max(end - first, self._stored.per_block)
        start = first // length * length
        known, counts = self._piece
        if known != start or len(counts) != length:
            self._progress(min(start / max(self._end, 1), 1.0))
            counts = self._stored.window(start, start + length)
            self._piece = start, counts
        block: Counts = counts[first - start : end - start].copy()
        return block if block.any() else None
