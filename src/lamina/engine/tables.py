"""Tables of an image in memory: bounded, written back in order, by the parts that changed.

A table is a ``bytearray`` known by its host offset. Users read and change entries with ``struct``
or ``array`` under the disk's lock and say which bytes they changed; ``engine.metadata`` collects
those parts when their stage is written. Tables that hold unwritten changes are never evicted:
``Metadata.relieve`` bounds how many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from lamina.engine.metadata import DirtyWrite, Metadata, Stage
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node

RECENT = 16
"""So many of the tables used last are never evicted: a caller may hold a few at once."""


_ZEROES = bytes(4096)


class TableCache:
    """The tables of one kind: L2 tables, refcount blocks, …"""

    def __init__(
        self,
        metadata: Metadata,
        *,
        table_bytes: int,
        capacity: int,
        stage: Stage,
        name: str = "",
        load_event: str = "",
        store_event: str = "",
        node: Node | None = None,
    ) -> None:
        """``table_bytes``: the usual size of a table; ``capacity``: bytes kept while clean.

        ``stage``: of changes that name none. ``name``: for the report of a failed close ("L2 table
        cache"). The events are told to the file before tables are read or written. ``node``: the
        file that holds the tables, if it is not that of ``metadata``.
        """
        self.metadata = metadata
        self.node = metadata.file if node is None else node
        self.table_bytes = table_bytes
        self.capacity = capacity
        self.stage = stage
        self.name = name
        self.load_event = load_event
        self.store_event = store_event
        # A part that is written covers whole pages of the host where tables are that large.
        self.grain = 4096 if table_bytes >= 4096 else 512
        self._tables: OrderedDict[int, bytearray] = OrderedDict()
        self._bytes = 0
        self._dirty: dict[Stage, dict[int, int]] = {}
        """Stage -> host offset -> changed grains, as the bits of a number."""
        self._dirty_grains = 0
        self._unsettled: list[tuple[int, Stage, dict[int, int]]] = []
        self.find: Callable[[int], bytearray | None] = self._tables.get
        """The table at a host offset if it is cached. For hot paths: it does not count as use."""
        metadata.register(self)

    # -- tables ----------------------------------------------------------------------------------

    def get(self, host_offset: int, length: int = 0) -> bytearray:
        """The table at ``host_offset`` (``length`` bytes, 0: the usual), loaded if need be.

        The caller has validated both. What lies behind the end of the file reads as zeroes.
        """
        table = self._tables.get(host_offset)
        if table is None:
            return self._load([(host_offset, length or self.table_bytes)])
        self._tables.move_to_end(host_offset)
        return table

    def prefetch(self, host_offsets: Iterable[int]) -> None:
        """Load those of the usual size that are missing with one read; as many as fit."""
        missing = [
            (offset, self.table_bytes)
            for offset in sorted(set(host_offsets))
            if offset not in self._tables
        ]
        room = max(self.capacity // self.table_bytes, 1)
        if missing:
            self._load(missing[:room])

    def new(
        self, host_offset: int, content: bytearray | None = None, *, at_once: bool = False
    ) -> bytearray:
        """A table at a place that was just allocated: zeroes, or ``content`` (taken over).

        It is dirty as a whole; whatever was cached for this place before is dropped.

        ``at_once``: it is written as well, so that the storage has room for it: a flush shall not
        be the first to see that it has not, when all that the table will carry is acknowledged.
        Raises StorageError with nothing changed.
        """
        table = bytearray(self.table_bytes) if content is None else content
        if at_once:
            self.node.write(host_offset, table)
        self.drop(host_offset)
        self._insert(host_offset, table)
        self.dirty(host_offset, 0, len(table))
        return table

    def drop(self, host_offset: int) -> None:
        """The place is not a table any more: forget it and its unwritten changes."""
        table = self._tables.pop(host_offset, None)
        if table is None:
            return
        self._bytes -= len(table)
        for masks in self._dirty.values():
            self._dirty_grains -= masks.pop(host_offset, 0).bit_count()
        for _, _, masks in self._unsettled:
            masks.pop(host_offset, None)

    def drop_clean(self) -> None:
        """Forget everything that needs no writing (the file may have been changed)."""
        held = self._held()
        for offset in [offset for offset in self._tables if offset not in held]:
            self._bytes -= len(self._tables.pop(offset))

    def dirty(self, host_offset: int, start: int, length: int, stage: Stage | None = None) -> None:
        """``length`` bytes from ``start`` of this cached table were changed."""
        if host_offset not in self._tables:
            raise KeyError(f"the table at {host_offset} is not cached")
        first = start // self.grain
        count = -(-(start + length) // self.grain) - first
        masks = self._dirty.setdefault(self.stage if stage is None else stage, {})
        before = masks.get(host_offset, 0)
        after = before | (((1 << count) - 1) << first)
        if after != before:
            masks[host_offset] = after
            self._dirty_grains += (after ^ before).bit_count()

    def update(
        self, host_offset: int, start: int, data: bytes | bytearray | memoryview
    ) -> None:
        """Change bytes of a table, loading it if need be."""
        self.get(host_offset)[start : start + len(data)] = data
        self.dirty(host_offset, start, len(data))

    def hold(self, host_offset: int, start: int, length: int) -> None:
        """Before the first entry of a part of a table is set: have room for that part.

        What is all zeroes may be a hole of the file. Written as it is, it is one no longer: a flush
        shall not be the first to see that there is no room, when everything that the table carries
        is acknowledged. Raises StorageError.
        """
        table = self.get(host_offset)
        changed = 0
        for masks in self._dirty.values():
            changed |= masks.get(host_offset, 0)
        for number in range(start // self.grain, -(-(start + length) // self.grain)):
            at = number * self.grain
            part = _ZEROES[: min(self.grain, len(table) - at)]
            if table.startswith(part, at) and not changed >> number & 1:
                self.node.write(host_offset + at, part)

    def _load(self, places: list[tuple[int, int]]) -> bytearray:
        """Load and return the last of these."""
        if self.load_event:
            self.node.event(self.load_event)
        end_of_file = self.node.size
        tables = [(offset, bytearray(length)) for offset, length in places]
        reads = []
        for offset, table in tables:
            inside = min(end_of_file - offset, len(table))
            if inside > 0:
                reads.append((offset, memoryview(table)[:inside]))
        if reads:
            self.node.readv(reads)
        for offset, table in tables:
            self._insert(offset, table)
        return tables[-1][1]

    def _insert(self, host_offset: int, table: bytearray) -> None:
        self._tables[host_offset] = table
        self._bytes += len(table)
        if self._bytes > self.capacity:
            self._evict()

    def _evict(self) -> None:
        held = self._held()
        candidates = list(self._tables)[:-RECENT]
        for offset in candidates:
            if offset not in held:
                self._bytes -= len(self._tables.pop(offset))
                if self._bytes <= self.capacity:
                    return

    def _held(self) -> set[int]:
        held: set[int] = set()
        held.update(*self._dirty.values(), *(masks for _, _, masks in self._unsettled))
        return held

    # -- a source of the metadata ----------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        return self._dirty_grains * self.grain

    def collect(self, stage: Stage) -> list[DirtyWrite]:
        masks = self._dirty.get(stage)
        if not masks:
            return []
        writes = []
        for host_offset, mask in masks.items():
            table = memoryview(self._tables[host_offset])
            for start, end in _runs(mask):
                part = table[start * self.grain : end * self.grain]
                place = host_offset + start * self.grain
                writes.append(DirtyWrite(place, part, self.store_event, self.node))
        return writes

    def written(self, stage: Stage, generation: int) -> None:
        masks = self._dirty.pop(stage)
        self._dirty_grains -= sum(mask.bit_count() for mask in masks.values())
        self._unsettled.append((generation, stage, masks))

    def settled(self, generation: int) -> None:
        if self._unsettled:
            self._unsettled = [entry for entry in self._unsettled if entry[0] > generation]

    def lost(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for _, stage, masks in unsettled:
            newer = self._dirty.setdefault(stage, {})
            for host_offset, mask in masks.items():
                before = newer.get(host_offset, 0)
                newer[host_offset] = before | mask
                self._dirty_grains += (mask & ~before).bit_count()


def _runs(mask: int) -> Iterable[tuple[int, int]]:
    """(start, end) of the runs of set bits."""
    start = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        start += zeros
        ones = (~mask & (mask + 1)).bit_length() - 1
        yield start, start + ones
        mask >>= ones
        start += ones
