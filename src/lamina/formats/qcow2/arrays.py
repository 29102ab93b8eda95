"""Tables of an image as numpy arrays, straight from the file, in long runs.

For work on the whole image: counting references, checking, listing extents. Nothing is cached and
nothing is trusted: what lies behind the end of the file reads as zeroes, as it does for QEMU.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lamina.buffers import new_buffer
from lamina.formats.qcow2.layout import COMPRESSED, COPIED, INCOMPAT_DATA_FILE, OFFSET_MASK
from lamina.hints import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Counts = npt.NDArray[Any]
"""Unsigned numbers as wide as refcounts may be: uint16, uint32 or uint64."""

Mask = npt.NDArray[np.bool_]

BATCH = 1 << 20
"""Bytes of tables that are looked at together: enough for Python's cost per batch not to count."""


def read_into(file: Node, pieces: list[tuple[int, memoryview]]) -> None:
    """Fill every buffer from its offset in ``file``; zeroes from the end of the file on."""
    size = file.size
    requests = []
    for offset, buffer in pieces:
        inside = min(max(size - offset, 0), len(buffer))
        if inside:
            requests.append((offset, buffer[:inside]))
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
    if requests:
        file.readv(requests)


def read_words(file: Node, offset: int, count: int) -> Words:
    """``count`` big-endian 64-bit entries from ``offset`` on, in the machine's byte order."""
    content = new_buffer(count * 8)
    read_into(file, [(offset, memoryview(content))])
    words = np.frombuffer(content, dtype=np.uint64)
    return words.byteswap(inplace=True) if _LITTLE else words


_LITTLE = bool(np.little_endian)


class TableRun(NamedTuple):
    """Several tables: row i holds the entries of the table at ``offsets[i]``."""

    first: int
    """Index of the first row among the tables that were asked for."""
    offsets: Indices
    entries: Words


def read_tables(file: Node, offsets: Indices, table_bytes: int) -> Iterator[TableRun]:
    """The tables at these host offsets, in this order, as many at a time as ``BATCH`` holds.

    Offset 0 stands for a table of zeroes. The arrays of a run are overwritten by the next one.
    """
    step = max(BATCH // table_bytes, 1)
    content = new_buffer(min(step, len(offsets)) * table_bytes)
    view = memoryview(content)
    raw = np.frombuffer(content, dtype=np.uint64).reshape(-1, table_bytes // 8)
    swapped = np.empty_like(raw) if _LITTLE else raw
    # Where a table does not adjoin the one before it in the file.
    apart = (np.diff(offsets) != table_bytes) | (offsets[:-1] == 0)
    breaks = (np.flatnonzero(apart) + 1).tolist()
    for first in range(0, len(offsets), step):
        part = offsets[first : first + step]
        count = len(part)
        inside = breaks[bisect_right(breaks, first) : bisect_left(breaks, first + count)]
        requests = []
        start = 0
        for end in (*(one - first for one in inside), count):
            piece = view[start * table_bytes : end * table_bytes]
            if offset := int(part[start]):
                requests.append((offset, piece))
            else:
                piece[:] = bytes(len(piece))
            start = end
        read_into(file, requests)
        if _LITTLE:
            # Out of place: twice as fast as numpy's byteswap in place.
            np.copyto(swapped[:count], raw[:count].view(">u8"))
        yield TableRun(first, part, swapped[:count])


def straight_tables(entries: Words, header: Header, file_size: int) -> Mask:
    """Which of these L2 tables are full of sound data clusters, each right behind the one before.

    Images that were filled in order are made of such tables, and one entry stands for all of one.
    """
    first = entries[:, 0]
    if header.extended_l2 or header.incompatible_features & INCOMPAT_DATA_FILE:
        return np.zeros(len(first), dtype=np.bool_)
    size = header.cluster_size
    span = np.uint64((header.l2_entries - 1) * size)
    offset = first & np.uint64(OFFSET_MASK)
    straight: Mask = (entries[:, -1] - first == span) & (offset + span < np.uint64(file_size))
    straight &= (offset != 0) & ((offset & np.uint64(size - 1)) == 0)
    straight &= (first & np.uint64(~(OFFSET_MASK | COPIED) & (1 << 64) - 1)) == 0
    if straight.all():
        every: Mask = (entries - first[:, None] == _ramp(header.l2_entries, size)).all(axis=1)
        return every
    for row in np.flatnonzero(straight).tolist():
        # One by one: picking rows would copy them.
        straight[row] = (entries[row] - first[row] == _ramp(header.l2_entries, size)).all()
    return straight


@lru_cache(maxsize=2)
def _ramp(count: int, step: int) -> Words:
    """0, step, 2 · step, …"""
    return np.arange(0, count * step, step, dtype=np.uint64)


def compressed_places(entries: Words, cluster_bits: int) -> tuple[Words, Words]:
    """``layout.compressed_extent`` of all these L2 entries, whether they are compressed or not."""
    shift = 62 - (cluster_bits - 8)
    offset = entries & np.uint64((1 << shift) - 1)
    sectors = (entries & np.uint64(COMPRESSED - 1)) >> np.uint64(shift)
    length = (sectors + np.uint64(1)) * np.uint64(512) - (offset & np.uint64(511))
    return offset, length


# -- refcount blocks -------------------------------------------------------------------------------


def count_type(refcount_order: int) -> type[np.unsignedinteger[Any]]:
    """What holds any count of this width; never narrower than 16 bits."""
    types: list[type[np.unsignedinteger[Any]]] = [np.uint16, np.uint32, np.uint64]
    return types[max(refcount_order - 4, 0)]


def unpack_counts(block: bytearray | memoryview | bytes, refcount_order: int) -> Counts:
    """The entries of one or more refcount blocks ("Host cluster management")."""
    if refcount_order >= 3:
        width = 1 << (refcount_order - 3)
        return np.frombuffer(block, dtype=f">u{width}").astype(count_type(refcount_order))
    raw = np.frombuffer(block, dtype=np.uint8)
    bits = 1 << refcount_order
    # The first entry is in the lowest bits of a byte.
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(-1).astype(np.uint16)


def pack_counts(counts: Counts, refcount_order: int) -> bytes:
    """The other way round; a count that is too large for the width is a programming error."""
    if refcount_order >= 3:
        return counts.astype(f">u{1 << (refcount_order - 3)}").tobytes()
    bits = 1 << refcount_order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts
    packed: bytes = np.bitwise_or.reduce(parts, axis=1).tobytes()
    return packed
