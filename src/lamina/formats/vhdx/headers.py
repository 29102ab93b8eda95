"""The two headers in use: the one that is not in force is overwritten, and takes over [2.2.2.1]."""

from __future__ import annotations

from lamina.errors import ImageCorrupt
from lamina.formats.vhdx.layout import (
    HEADER_BYTES,
    HEADER_OFFSETS,
    Header,
    current_header,
    parse_header,
)
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.node import Node

_LAST = (1 << 64) - 3
"""Two more fit into 64 bits."""


class Headers:
    def __init__(self, file: Node) -> None:
        """Raises ImageCorrupt if neither is valid."""
        self.file = file
        first, second = (
            parse_header(file.read(offset, max(min(HEADER_BYTES, file.size - offset), 0)))
            for offset in HEADER_OFFSETS
        )
        self.valid = (first is not None, second is not None)
        self._slot = current_header((first, second))
        current = second if self._slot else first
        assert current is not None
        self.current: Header = current
        self.certain = True
        """Off after an update that failed: nobody knows what of it is in the file."""

    def update(self, **changes: Any) -> None:
        """Durably change fields, in both headers, one after the other."""
        if self.current.sequence >= _LAST:
            raise ImageCorrupt(
                "The VHDX headers have used up their sequence numbers",
                path=self.file.filename,
                format="vhdx",
                structure="header",
                field="SequenceNumber",
            )
        self.certain = False
        for _ in HEADER_OFFSETS:
            header = replace(self.current, sequence=self.current.sequence + 1, **changes)
            slot = 1 - self._slot
            self.file.write(HEADER_OFFSETS[slot], header.pack())
            self.file.flush()
            self._slot, self.current = slot, header
        self.valid = (True, True)
        self.certain = True
