"""Overlap checks: no write may land on metadata that it is not meant for.

A wrong refcount would otherwise let guest data replace a table. Which structures are watched is an
option; the clusters that they occupy are collected on the first write and kept up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lamina.errors import LaminaError, UsageError
from lamina.formats.qcow2.layout import OFFSET_MASK, REFTABLE_OFFSET_MASK
from lamina.formats.qcow2.options import OVERLAP_ITEMS, OVERLAP_MODES, Options
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

    from lamina.block.node import Node
    from lamina.formats.qcow2.corruption import Corruption
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.snapshot_layout import Snapshot


class Structure:
    """Kinds of metadata, as bits of plain numbers: they are looked at before every write."""

    MAIN_HEADER = 1
    ACTIVE_L1 = 2
    ACTIVE_L2 = 4
    REFCOUNT_BLOCK = 8
    REFCOUNT_TABLE = 16
    SNAPSHOT_TABLE = 32
    INACTIVE_L1 = 64
    INACTIVE_L2 = 128
    BITMAP_DIRECTORY = 256


_NAMES = {
    Structure.MAIN_HEADER: "qcow2_header",
    Structure.ACTIVE_L1: "active L1 table",
    Structure.ACTIVE_L2: "active L2 table",
    Structure.REFCOUNT_BLOCK: "refcount block",
    Structure.REFCOUNT_TABLE: "refcount table",
    Structure.SNAPSHOT_TABLE: "snapshot table",
    Structure.INACTIVE_L1: "inactive L1 table",
    Structure.INACTIVE_L2: "inactive L2 table",
    Structure.BITMAP_DIRECTORY: "bitmap directory",
}

_CONSTANT = (
    Structure.MAIN_HEADER
    | Structure.ACTIVE_L1
    | Structure.REFCOUNT_TABLE
    | Structure.SNAPSHOT_TABLE
    | Structure.BITMAP_DIRECTORY
)
_CACHED = _CONSTANT | Structure.ACTIVE_L2 | Structure.REFCOUNT_BLOCK | Structure.INACTIVE_L1
_MODES = {
    "none": 0,
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | Structure.INACTIVE_L2,
}


def watched(options: Options) -> int:
    """What the options ask to check. Raises UsageError."""
    mode, template = options.overlap_check, options.overlap_check_template
    if mode is not None and template is not None and mode != template:
        raise UsageError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{mode}') and "
            f"'overlap-check.template' ('{template}')"
        )
    chosen = mode or template or ("cached" if mode is None and template is None else "")
    if chosen not in OVERLAP_MODES:
        raise UsageError(
            f"Unsupported value '{chosen}' for qcow2 option 'overlap-check'. Allowed are any of "
            "the following: none, constant, cached, all"
        )
    structures = _MODES[chosen]
    for item in OVERLAP_ITEMS:
        wanted = getattr(options, "overlap_" + item.replace("-", "_"))
        if wanted is not None:
            one: int = getattr(Structure, item.replace("-", "_").upper())
            structures = structures | one if wanted else structures & ~one
    return structures


class Overlap:
    """The clusters that metadata occupies."""

    def __init__(self, file: Node, header: Header, corruption: Corruption) -> None:
        self.file = file
        self.header = header
        self.corruption = corruption
        self.watched = _MODES["cached"]
        self.snapshots: list[Snapshot] = []
        self.l1: array[int] | None = None
        self.refcount_table: Callable[[], array[int]] | None = None
        self._clusters: dict[int, int] | None = None
        """Cluster -> structures in it. None: to be collected."""

    def forget(self) -> None:
        """Collect anew before the next check."""
        self._clusters = None

    # -- checking --------------------------------------------------------------------------------

    def check(self, host_offset: int, length: int) -> None:
        """Raises ImageCorrupt if a write there would hit metadata."""
        clusters = self.occupied
        bits = self.header.cluster_bits
        first, last = host_offset >> bits, (host_offset + length - 1) >> bits
        for cluster in range(first, last + 1):
            if cluster in clusters:
                raise self._found(clusters[cluster], host_offset)

    def check_table(self, host_offset: int, own: int) -> None:
        """Raises ImageCorrupt if the table of this kind shares its cluster with another one."""
        others = self.occupied.get(host_offset >> self.header.cluster_bits, 0) & ~own
        if others:
            raise self._found(others, host_offset)

    def _found(self, structures: int, host_offset: int) -> LaminaError:
        name = next(name for structure, name in _NAMES.items() if structures & structure)
        return self.corruption.found(
            f"Preventing invalid write on metadata (overlaps with {name})",
            structure=name,
            offset=host_offset,
        )

    # -- keeping up to date ----------------------------------------------------------------------

    def add_refcount_block(self, host_offset: int) -> None:
        self._add(Structure.REFCOUNT_BLOCK, host_offset, 1)

    def add_l2_table(self, host_offset: int) -> None:
        self._add(Structure.ACTIVE_L2, host_offset, 1)

    def add_refcount_table(self) -> None:
        """The header names a new one; the old one counts until it is free."""
        header = self.header
        length = header.refcount_table_clusters << header.cluster_bits
        self._add(Structure.REFCOUNT_TABLE, header.refcount_table_offset, length)

    def add_l1_table(self) -> None:
        """The header names a new one; the old one counts until it is free."""
        self._add(
            Structure.ACTIVE_L1, self.header.l1_table_offset, max(self.header.l1_size * 8, 1)
        )

    def remove(self, host_offset: int, length: int) -> None:
        """These clusters are free now."""
        if self._clusters:
            bits = self.header.cluster_bits
            for cluster in range(host_offset >> bits, (host_offset + length) >> bits):
                self._clusters.pop(cluster, None)

    def _add(self, structure: int, host_offset: int, length: int) -> None:
        if self._clusters is not None and structure & self.watched:
            _mark(self._clusters, structure, host_offset, length, self.header.cluster_bits)

    # -- collecting ------------------------------------------------------------------------------

    @property
    def occupied(self) -> dict[int, int]:
        """Cluster -> the structures in it."""
        if self._clusters is None:
            self._clusters = self._collect()
        return self._clusters

    def _collect(self) -> dict[int, int]:
        header = self.header
        clusters: dict[int, int] = {}

        def mark(structure: int, places: Iterable[tuple[int, int]]) -> None:
            if structure & self.watched:
                for offset, length in places:
                    if length:
                        _mark(clusters, structure, offset, length, header.cluster_bits)

        def tables(entries: array[int], mask: int) -> Iterable[tuple[int, int]]:
            # Behind its last entry a refcount table has a quarter of a million zeroes.
            used = -(-len(entries.tobytes().rstrip(b"\0")) // entries.itemsize)
            return ((entry & mask, 1) for entry in entries[:used] if entry & mask)

        mark(Structure.MAIN_HEADER, [(0, 1)])
        mark(Structure.ACTIVE_L1, [(header.l1_table_offset, header.l1_size * 8)])
        if self.l1 is not None:
            mark(Structure.ACTIVE_L2, tables(self.l1, OFFSET_MASK))
        mark(
            Structure.REFCOUNT_TABLE,
            [
                (
                    header.refcount_table_offset,
                    header.refcount_table_clusters << header.cluster_bits,
                )
            ],
        )
        if self.refcount_table is not None:
            mark(Structure.REFCOUNT_BLOCK, tables(self.refcount_table(), REFTABLE_OFFSET_MASK))
        if self.snapshots:
            end = max(s.entry_offset + s.entry_length for s in self.snapshots)
            mark(Structure.SNAPSHOT_TABLE, [(header.snapshots_offset, end)])
            mark(
                Structure.INACTIVE_L1,
                ((s.l1_table_offset, s.l1_size * 8) for s in self.snapshots),
            )
            if self.watched & Structure.INACTIVE_L2:
                for snapshot in self.snapshots:
                    mark(Structure.INACTIVE_L2, tables(self._l1_of(snapshot), OFFSET_MASK))
        if header.bitmaps is not None and header.autoclear_features & 1:
            mark(
                Structure.BITMAP_DIRECTORY,
                [(header.bitmaps.directory_offset, header.bitmaps.directory_size)],
            )
        return clusters

    def _l1_of(self, snapshot: Snapshot) -> array[int]:
        from lamina.formats.qcow2.refcounts import read_table
        from lamina.formats.qcow2.snapshots import check_l1

        check_l1(snapshot, self.header)
        return read_table(self.file, snapshot.l1_table_offset, snapshot.l1_size)


def _mark(clusters: dict[int, int], structure: int, offset: int, length: int, bits: int) -> None:
    for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
        clusters[cluster] = clusters.get(cluster, 0) | structure
