"""The two levels of tables of an open QED image: entries out of parts of tables, and back.

Tables may be large (a gigabyte at most), so parts of them are loaded and written, never wholes.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence

from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.engine.appending import Appender
    from lamina.formats.qed.layout import Header

_ENTRY = struct.Struct("<Q")
PART = 1 << 16
"""Bytes of a table that are loaded at once, at most."""
CACHE_BYTES = 16 << 20


class Tables:
    def __init__(
        self, file: Node, header: Header, metadata: Metadata, appender: Appender
    ) -> None:
        self._file = file
        self.header = header
        self._metadata = metadata
        self._appender = appender
        self.part_bytes = min(PART, header.table_bytes)
        self._l2 = self._cache(Stage.TABLES, CACHE_BYTES, "L2 table cache")
        self._l1 = self._cache(Stage.ROOTS, CACHE_BYTES // 4, "L1 table")

    def _cache(self, stage: Stage, capacity: int, name: str) -> TableCache:
        return TableCache(
            self._metadata,
            table_bytes=self.part_bytes,
            capacity=capacity,
            stage=stage,
            name=name,
        )

    def _place(self, table: int, index: int) -> tuple[int, int]:
        """Host offset of the part of a table that holds an entry, and where it is in there."""
        at = 8 * index
        start = at // self.part_bytes * self.part_bytes
        return table + start, at - start

    # -- L1 --------------------------------------------------------------------------------------

    def l2_table(self, index: int) -> int:
        """Host offset of the L2 table that an L1 entry names; 0: there is none."""
        part, at = self._place(self.header.l1_table_offset, index)
        cached = self._l1.find(part)
        if cached is None:
            cached = self._l1.get(part)
        table: int = _ENTRY.unpack_from(cached, at)[0]
        if table:
            self.check_table(index, table)
        return table

    def check_table(self, index: int, table: int) -> None:
        """Raises ImageCorrupt unless there can be an L2 table at ``table``."""
        header = self.header
        if (
            table % header.cluster_size
            or table < header.header_bytes
            or table + header.table_bytes > self._appender.end
        ):
            raise ImageCorrupt(
                f"L2 table offset {table:#x} is invalid",
                path=self._file.filename,
                format="qed",
                structure="L1 table",
                field=f"entry {index}",
                offset=header.l1_table_offset + 8 * index,
            )

    def need_table(self, index: int) -> int:
        """The L2 table of an L1 entry, an empty one if there is none. Raises StorageError."""
        table = self.l2_table(index)
        if table:
            return table
        length = self.header.table_bytes
        self._l1.hold(*self._place(self.header.l1_table_offset, index), _ENTRY.size)
        start = self._appender.end
        table, _ = self._appender.take(length, self.header.cluster_size)
        try:
            self._appender.reach(table + length)
            # Not left to be a hole: a flush shall not be the first to see that there is no room.
            self._file.write_zeroes(table, length)
            self._metadata.data_written(self._file)
        except BaseException:
            self._appender.give_back(start, table + length)
            raise
        for part in range(table, table + length, self.part_bytes):
            self._l2.drop(part)
        self.set_l1(index, table)
        return table

    def l2_indices(self) -> Iterator[int]:
        """The L1 entries that are set, whatever they say."""
        first = self.header.l1_table_offset
        for part in range(first, first + self.header.table_bytes, self.part_bytes):
            entries = memoryview(self._l1.get(part)).cast("Q").tolist()
            for number, entry in enumerate(entries) if any(entries) else ():
                if entry:
                    yield (part - first) // 8 + number

    def set_l1(self, index: int, table: int) -> None:
        part, at = self._place(self.header.l1_table_offset, index)
        self._l1.update(part, at, _ENTRY.pack(table))

    # -- L2 --------------------------------------------------------------------------------------

    def entry(self, cluster: int) -> int:
        """The L2 entry of a guest cluster, as it is stored."""
        l1_index, index = divmod(cluster, self.header.table_entries)
        table = self.l2_table(l1_index)
        if not table:
            return 0
        part, at = self._place(table, index)
        cached = self._l2.find(part)
        if cached is None:
            cached = self._l2.get(part)
        found: int = _ENTRY.unpack_from(cached, at)[0]
        return found

    def runs(self, cluster: int, count: int) -> Iterator[tuple[int, int, Sequence[int] | None]]:
        """(first cluster, how many, their L2 entries or None where there is no table)."""
        per_table = self.header.table_entries
        per_part = self.part_bytes // 8
        while count:
            l1_index, index = divmod(cluster, per_table)
            table = self.l2_table(l1_index)
            if not table:
                run = min(count, per_table - index)
                yield cluster, run, None
            else:
                run = min(count, per_part - index % per_part)
                yield cluster, run, self._entries(table, index, run)
            cluster += run
            count -= run

    def _entries(self, table: int, index: int, count: int) -> Sequence[int]:
        part, at = self._place(table, index)
        entries = array("Q", self._l2.get(part)[at : at + 8 * count])
        if sys.byteorder != "little":
            entries.byteswap()
        return entries

    def set_entry(self, cluster: int, entry: int) -> None:
        """The L2 table must be there."""
        self._set_entries(cluster, array("Q", (entry,)))

    def set_places(self, cluster: int, count: int, host_offset: int) -> None:
        """Of clusters one behind the other, whose entries lie in one part of an L2 table."""
        unit = self.header.cluster_size
        places = range(host_offset, host_offset + count * unit, unit)
        self._set_entries(cluster, array("Q", places))

    def _set_entries(self, cluster: int, entries: array[int]) -> None:
        l1_index, index = divmod(cluster, self.header.table_entries)
        part, at = self._place(self.l2_table(l1_index), index)
        if sys.byteorder != "little":
            entries.byteswap()
        self._l2.update(part, at, entries.tobytes())

    def forget(self) -> None:
        """The file was changed behind our back, with nothing dirty here."""
        self._l1.drop_clean()
        self._l2.drop_clean()
