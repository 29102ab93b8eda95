"""Extents whose tables are only ever read, and kept as arrays of sectors."""

from __future__ import annotations

import errno
import sys
from abc import abstractmethod
from array import array
from collections.abc import Iterator

from lamina.errors import Refused
from lamina.formats.vmdk.extents import Entries, GrainExtent
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node

_KEPT_BYTES = 4 << 20
"""Of tables that one extent keeps."""


class TablesExtent(GrainExtent):
    kind: str
    """As ``createType`` has it."""
    table_entries: int
    _tables: dict[int, array[int]]

    def check_writable(self) -> None:
        raise Refused(f"No write support for {self.kind} images available", errno=errno.EACCES)

    @abstractmethod
    def load_table(self, number: int) -> array[int] | None:
        """Sectors of the grains of a table; None: there is no such table. Raises ImageCorrupt."""

    def _table(self, number: int) -> array[int] | None:
        tables = self._tables
        found = tables.get(number)
        if found is None:
            found = self.load_table(number)
            if found is not None:
                most = _KEPT_BYTES // (len(found) * found.itemsize)
                while len(tables) >= most:
                    del tables[next(iter(tables))]
                tables[number] = found
        return found

    def entries(self, first: int, count: int) -> Iterator[tuple[int, int, Entries | None]]:
        while count:
            number, index = divmod(first, self.table_entries)
            run = min(count, self.table_entries - index)
            table = self._table(number)
            yield first, run, None if table is None else table[index : index + run]
            first += run
            count -= run

    def entries_array(self, first: int, count: int) -> npt.NDArray[np.int64]:
        import numpy as np

        found = np.zeros(count, np.int64)
        for number, run, sectors in self.entries(first, count):
            if sectors is not None:
                found[number - first : number - first + run] = sectors
        return found


def read_words(node: Node, offset: int, count: int, *, code: str = "I") -> array[int]:
    """``count`` little-endian numbers; ``code``: "I" for 32 bits, "Q" for 64. Behind the end of the
    file there are zeroes."""
    words = array(code, bytes(count * (4 if code == "I" else 8)))
    node.readv([(offset, memoryview(words).cast("B"))])
    if sys.byteorder == "big":
        words.byteswap()
    return words
