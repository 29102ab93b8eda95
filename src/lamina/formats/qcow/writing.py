"""What a write needs: space at the end, and the entries that name it once the data is there."""

from __future__ import annotations

from array import array

from lamina.engine.mapping import Piece, Reservation
from lamina.formats.qcow import layout
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.qcow.mapping import QcowMapping


class QcowReservation(Reservation):
    """Clusters at the end of the file that no table names yet."""

    def __init__(
        self, mapping: QcowMapping, pieces: list[Piece], end_before: int, *, encoded: bool = False
    ) -> None:
        self.pieces = pieces
        self._mapping = mapping
        self._end_before = end_before
        self._end = mapping.end
        self._encoded = encoded

    def commit(self) -> None:
        mapping = self._mapping
        unit = mapping.unit
        for piece in self.pieces:
            if self._encoded:
                entry = layout.compressed_entry(mapping.header, piece.host_offset, piece.length)
                entries = array("Q", [entry])
            elif piece.fresh:
                first = piece.host_offset - piece.copy_head
                end = piece.host_offset + piece.length + piece.copy_tail
                entries = array("Q", range(first, end, unit))
            else:
                continue
            mapping.publish(piece.guest_offset - piece.copy_head, entries)

    def abort(self) -> None:
        """Space at the very end is used again; behind it, somebody else has appended."""
        if self._mapping.end == self._end:
            self._mapping.end = self._end_before
