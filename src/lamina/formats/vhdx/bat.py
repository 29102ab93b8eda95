"""The block allocation table [2.5]: an entry for each block of the disk.

Behind the entries of each chunk of payload blocks stands that of the bitmap block that says which
sectors of the chunk are in a differencing image.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence

from lamina.engine.metadata import Stage
from lamina.engine.tables import TableCache
from lamina.hints import TYPE_CHECKING
from lamina.units import KIB, MIB

if TYPE_CHECKING:
    from lamina.engine.metadata import Metadata
    from lamina.formats.vhdx.layout import Region
    from lamina.formats.vhdx.metadata import Parameters

_ENTRY = struct.Struct("<Q")
TABLE_BYTES = 64 * KIB
"""The table is kept in parts of this size, so that a huge one is not loaded as a whole."""
CACHE_BYTES = 16 * MIB
_PER_TABLE = TABLE_BYTES // 8


class Bat:
    def __init__(self, metadata: Metadata, region: Region, parameters: Parameters) -> None:
        self.metadata = metadata
        self.offset = region.offset
        self.length = region.length
        self.resized(parameters)
        self.tables = TableCache(
            metadata,
            table_bytes=TABLE_BYTES,
            capacity=CACHE_BYTES,
            stage=Stage.ROOTS,
            name="block allocation table",
        )

    def resized(self, parameters: Parameters) -> None:
        """The disk has another size."""
        self.blocks = parameters.blocks
        self.ratio = parameters.chunk_ratio
        self.ratio_bits = self.ratio.bit_length() - 1
        self.chunks = -(-self.blocks // self.ratio)
        self.count = parameters.bat_entries

    def place(self, index: int) -> tuple[int, int]:
        """Host offset of the table that an entry is in, and where it is there."""
        part, at = divmod(8 * index, TABLE_BYTES)
        return self.offset + part * TABLE_BYTES, at

    def _get(self, index: int) -> int:
        table, at = self.place(index)
        entry: int = _ENTRY.unpack_from(self.tables.get(table), at)[0]
        return entry

    def _set(self, index: int, entry: int) -> None:
        table, at = self.place(index)
        self.tables.update(table, at, _ENTRY.pack(entry))

    def _hold(self, index: int) -> None:
        table, at = self.place(index)
        self.tables.hold(table, at, _ENTRY.size)

    def hold(self, block: int) -> None:
        """See to it that the file has room for the entry of a block."""
        self._hold(block + (block >> self.ratio_bits))

    def get(self, block: int) -> int:
        return self._get(block + (block >> self.ratio_bits))

    def set(self, block: int, entry: int) -> None:
        self._set(block + (block >> self.ratio_bits), entry)

    def fill(self, block: int, count: int, entry: int) -> None:
        """Give many blocks the same entry."""
        packed = _ENTRY.pack(entry)
        while count:
            table, at = self.place(block + (block >> self.ratio_bits))
            run = min(count, self.ratio - (block & (self.ratio - 1)), _PER_TABLE - at // 8)
            self.tables.update(table, at, packed * run)
            block += run
            count -= run

    def bitmap(self, chunk: int) -> int:
        """The entry of the bitmap block of a chunk; only differencing images need to have it."""
        return self._get(chunk * (self.ratio + 1) + self.ratio)

    def hold_bitmap(self, chunk: int) -> None:
        """See to it that the file has room for the entry of the bitmap block of a chunk."""
        self._hold(chunk * (self.ratio + 1) + self.ratio)

    def set_bitmap(self, chunk: int, entry: int) -> None:
        self._set(chunk * (self.ratio + 1) + self.ratio, entry)

    def entries(self, block: int, count: int) -> Iterator[tuple[int, Sequence[int]]]:
        """(first block, entries) of runs that cover these payload blocks."""
        while count:
            index = block + (block >> self.ratio_bits)
            table, at = self.place(index)
            run = min(count, self.ratio - (block & (self.ratio - 1)), _PER_TABLE - at // 8)
            yield block, _numbers(self.tables.get(table)[at : at + 8 * run])
            block += run
            count -= run

    def everything(self) -> Iterator[tuple[int, Sequence[int]]]:
        """(first index, entries) of the table as it is in memory or in the file, in parts."""
        for start in range(0, self.count, _PER_TABLE):
            count = min(_PER_TABLE, self.count - start)
            table = self.tables.get(self.offset + 8 * start)
            yield start, _numbers(table[: 8 * count])

    def is_bitmap(self, index: int) -> bool:
        """Whether an entry is that of a bitmap block."""
        return index % (self.ratio + 1) == self.ratio

    def block_of(self, index: int) -> int:
        """The payload block of an entry."""
        return index - index // (self.ratio + 1)


def _numbers(data: bytearray) -> Sequence[int]:
    numbers = array("Q", data)
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        numbers.byteswap()
    return numbers
