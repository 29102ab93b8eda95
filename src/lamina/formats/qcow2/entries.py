"""What can be wrong with the entries of L2 tables, and how it is mended.

All entries of a batch are looked at together; only what is wrong becomes Python objects. The
sentences are those of ``qemu-img check``. Mending never loses data that can still be found: bits
that mean nothing are cleared, and an entry that names no usable place becomes a cluster of zeroes
(in version 2, which knows none, an unallocated cluster).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lamina.formats.qcow2.arrays import Mask, Words, compressed_places
from lamina.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    INCOMPAT_DATA_FILE,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO_FLAG,
    compressed_extent,
)
from lamina.hints import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lamina.formats.qcow2.layout import Header

_ALLOCATED_BITS = np.uint64(0xFFFFFFFF)
_ZERO_SHIFT = np.uint64(32)


class Trouble(NamedTuple):
    """One thing that is wrong with one entry."""

    position: int
    """Of the entry in the batch."""
    message: str
    """What follows "ERROR", or "Repairing" where it is mended."""
    clear: int = 0
    """Bits of the entry's first word that must not be set …"""
    clear_bitmap: int = 0
    """… and of the second one, with extended L2 entries."""
    worthless: bool = False
    """The entry names no usable place at all."""


class Entries:
    """The entries of a batch of L2 tables, taken apart.

    ``places`` are the entries that name whole clusters (data, or reserved for zeroes) and
    ``encoded`` those of compressed clusters; both only as far as references count.
    """

    def __init__(self, header: Header, file_size: int, words: Words) -> None:
        """``words``: entries of whole tables, row by row."""
        self.header = header
        self.file_size = file_size
        self.extended = header.extended_l2
        flat = words.reshape(-1)
        self.words = flat[::2] if self.extended else flat
        self.bitmaps = flat[1::2] if self.extended else None
        self.data_file = bool(header.incompatible_features & INCOMPAT_DATA_FILE)
        # Version 2 knows no zero flag.
        self.reserved = L2_RESERVED | (ZERO_FLAG if header.version < 3 else 0)
        unaligned = header.cluster_size - 1 & OFFSET_MASK
        self._unaligned = np.uint64(unaligned)
        self.offsets = self.words & np.uint64(OFFSET_MASK)
        # The usual batch has nothing but plain clusters in it; two reductions can tell.
        union = int(np.bitwise_or.reduce(self.words)) if len(self.words) else 0
        self.plain = not (
            union & (COMPRESSED | self.reserved | unaligned)
            or self.extended
            or self.data_file
            or int(self.offsets.max(initial=0)) >= file_size
        )
        if self.plain:
            self.allocated: Mask = self.offsets != 0
            self.compressed: Mask | None = None
        else:
            self.compressed = (self.words & np.uint64(COMPRESSED)) != 0
            named = self.offsets != 0
            if self.data_file:
                # Only there a cluster may lie at offset 0; COPIED tells it from an unused entry.
                copied = (self.words & np.uint64(COPIED)) != 0
                if not self.extended:
                    copied &= (self.words & np.uint64(ZERO_FLAG)) == 0
                named |= copied
            self.allocated = named & ~self.compressed

    # -- what is wrong ---------------------------------------------------------------------------

    def troubles(self) -> list[Trouble]:
        """In the order of the entries."""
        if self.plain:
            return []
        assert self.compressed is not None
        found: list[Trouble] = []
        uncompressed = ~self.compressed
        reserved = uncompressed & ((self.words & np.uint64(self.reserved)) != 0)
        unaligned = self.allocated & ((self.offsets & self._unaligned) != 0)
        self._each(reserved, self._reserved, found)
        if self.bitmaps is not None:
            present = self.bitmaps & _ALLOCATED_BITS
            both = (present & (self.bitmaps >> _ZERO_SHIFT)) != 0
            self._each(self.allocated & both, self._both_bits, found)
            self._each(uncompressed & ~self.allocated & (present != 0), self._lost_bits, found)
            self._each(self.compressed & (self.bitmaps != 0), self._compressed_bitmap, found)
        self._each(unaligned, self._unaligned_place, found)
        if self.data_file:
            self._each(self.compressed, self._compressed_in_data_file, found)
        else:
            beyond = self.allocated & ~self.inside(self.offsets, self.header.cluster_size)
            self._each(beyond, self._beyond, found)
            copied = self.compressed & ((self.words & np.uint64(COPIED)) != 0)
            self._each(copied, self._compressed_copied, found)
            offset, length = self.encoded_places()
            beyond = self.compressed & ~self.inside(offset, length)
            self._each(beyond, self._encoded_beyond, found)
        # Python's sort is stable: what is wrong with one entry stays in the order of the checks.
        found.sort(key=lambda trouble: trouble.position)
        return found

    def inside(self, offset: Words, length: Any) -> Mask:
        """Whether regions end less than a cluster behind the end of the file, as QEMU demands."""
        inside: Mask = offset + np.asarray(length, np.uint64) < np.uint64(
            self.file_size + self.header.cluster_size
        )
        return inside

    def encoded_places(self) -> tuple[Words, Words]:
        """(host offset, bytes at most) of all entries, as if they were compressed ones."""
        return compressed_places(self.words, self.header.cluster_bits)

    def _each(
        self,
        which: Mask,
        describe: Callable[[int, int, int], Trouble],
        found: list[Trouble],
    ) -> None:
        for position in np.flatnonzero(which).tolist():
            word = int(self.words[position])
            bitmap = 0 if self.bitmaps is None else int(self.bitmaps[position])
            found.append(describe(position, word, bitmap))

    # -- each trouble --------------------------------------------------------------------------

    def _reserved(self, position: int, word: int, bitmap: int) -> Trouble:
        message = f" found l2 entry with reserved bits set: {word:x}"
        return Trouble(position, message, clear=self.reserved)

    def _unaligned_place(self, position: int, word: int, bitmap: int) -> Trouble:
        if self.extended:
            reserved = bitmap >> 32 == 0xFFFFFFFF
        else:
            reserved = self.header.version >= 3 and bool(word & ZERO_FLAG)
        what = "Preallocated" if reserved else "Data"
        message = (
            f" offset={word & OFFSET_MASK:x}: {what} cluster is not properly aligned; "
            "L2 entry corrupted."
        )
        return Trouble(position, message, worthless=True)

    def _beyond(self, position: int, word: int, bitmap: int) -> Trouble:
        message = beyond(word & OFFSET_MASK, self.header.cluster_size)
        return Trouble(position, message, worthless=True)

    def _encoded_beyond(self, position: int, word: int, bitmap: int) -> Trouble:
        message = beyond(*compressed_extent(word, self.header.cluster_bits))
        return Trouble(position, message, worthless=True)

    def _compressed_copied(self, position: int, word: int, bitmap: int) -> Trouble:
        offset, _ = compressed_extent(word, self.header.cluster_bits)
        message = (
            f": coffset={offset:#x}: copied flag must never be set for compressed clusters"
        )
        return Trouble(position, message, clear=COPIED)

    def _compressed_in_data_file(self, position: int, word: int, bitmap: int) -> Trouble:
        index = position % self.header.l2_entries
        message = f" compressed cluster {index} with data file, entry={word:#x}"
        return Trouble(position, message, worthless=True)

    def _compressed_bitmap(self, position: int, word: int, bitmap: int) -> Trouble:
        index = position % self.header.l2_entries
        message = (
            f" compressed cluster {index} with non-zero subcluster allocation bitmap, "
            f"entry={word:#x}"
        )
        return Trouble(position, message, clear_bitmap=bitmap)

    def _both_bits(self, position: int, word: int, bitmap: int) -> Trouble:
        message = (
            f" offset={word & OFFSET_MASK:x}: Allocated cluster has corrupted subcluster "
            "allocation bitmap"
        )
        # The data is there: it must not vanish behind a zero bit.
        return Trouble(position, message, clear_bitmap=(bitmap & 0xFFFFFFFF) << 32)

    def _lost_bits(self, position: int, word: int, bitmap: int) -> Trouble:
        message = ": Unallocated cluster has non-zero subcluster allocation map"
        return Trouble(position, message, clear_bitmap=0xFFFFFFFF)

    # -- mending -------------------------------------------------------------------------------

    def mended(self, trouble: Trouble, word: int, bitmap: int) -> tuple[int, int]:
        """The entry (both words of it) without this trouble."""
        if not trouble.worthless:
            return word & ~trouble.clear, bitmap & ~trouble.clear_bitmap
        if self.extended:
            return 0, 0xFFFFFFFF << 32
        return (ZERO_FLAG if self.header.version >= 3 else 0), 0

    # -- what counts -------------------------------------------------------------------------------

    def counted_compressed(self) -> Mask:
        """Compressed entries that make enough sense for their clusters to count."""
        assert self.compressed is not None
        if self.data_file:
            return np.zeros(len(self.words), dtype=np.bool_)
        if self.bitmaps is not None:
            bare: Mask = self.bitmaps == 0
            return self.compressed & bare
        return self.compressed


def beyond(offset: int, length: int) -> str:
    """A reference to what lies behind the end of the file."""
    return (
        ": counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset {offset:#x} size {length:#x}"
    )
