"""The refcount structure built anew from the references that were counted.

The new table and its blocks lie together behind everything that is in use, and count the old ones
too, so that the image is sound whether or not the header names them yet. Giving the old ones back
is the last step, and the caller's.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import numpy as np

from lamina.errors import StorageError
from lamina.formats.qcow2.arrays import Counts, Words, pack_counts
from lamina.formats.qcow2.layout import MAX_REFCOUNT_TABLE
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header

REFCOUNT_TABLE_FIELDS = 48
"""Offset of the header's refcount_table_offset, which refcount_table_clusters follows."""

CountsOf = Callable[[int, int], "Counts | None"]
"""(first cluster, end) of one block -> how often each is referenced; None: none of them is.
Ends may lie behind the end of the file. Called with ascending clusters."""


def rebuild(file: Node, header: Header, end: int, counts_of: CountsOf) -> tuple[Words, int]:
    """Write a refcount structure from cluster ``end`` on and have the header name it.

    ``end``: the first of the clusters behind all that are in use. Returns the new table and the
    number of clusters that the structure takes. Raises StorageError; the image is unchanged then.
    """
    table, offset, clusters = write_structure(
        file, header, header.refcount_order, end, counts_of
    )
    table_clusters = len(table) * 8 >> header.cluster_bits
    file.write(REFCOUNT_TABLE_FIELDS, struct.pack(">QI", offset, table_clusters))
    file.flush()
    header.refcount_table_offset = offset
    header.refcount_table_clusters = table_clusters
    return table, clusters


def write_structure(
    file: Node, header: Header, order: int, end: int, counts_of: CountsOf
) -> tuple[Words, int, int]:
    """The same without the header, with counts that are ``1 << order`` bits wide. Durable on
    return; returns the table, its host offset, and the number of clusters in all.

    Blocks come first, then the table.
    """
    per_block = header.cluster_size * 8 >> order
    per_table = header.cluster_size // 8
    bits = header.cluster_bits
    used = [
        block
        for block in range(-(-end // per_block))
        if counts_of(block * per_block, (block + 1) * per_block) is not None
    ]
    table_clusters = block_count = 0
    while True:
        last = end + table_clusters + block_count
        blocks = sorted({*used, *range(end // per_block, -(-last // per_block))})
        need = -(-(blocks[-1] + 1) // per_table) if blocks else 1
        if (need, len(blocks)) == (table_clusters, block_count):
            break
        table_clusters, block_count = need, len(blocks)
    if table_clusters << bits > MAX_REFCOUNT_TABLE or last << bits >= 1 << 56:
        raise StorageError.from_errno(errno.EFBIG)
    table = np.zeros(table_clusters * per_table, dtype=np.uint64)
    for number, block in enumerate(blocks):
        first = block * per_block
        counts = counts_of(first, first + per_block)
        if counts is None:
            counts = np.zeros(per_block, dtype=np.uint16)
        new = slice(max(end - first, 0), max(last - first, 0))
        counts[new] = 1
        place = (end + number) << bits
        file.write(place, pack_counts(counts, order))
        table[block] = place
    table_offset = (end + block_count) << bits
    file.write(table_offset, table.astype(">u8").tobytes())
    file.flush()
    return table, table_offset, last - end

