"""What the persistent bitmaps refer to, and which of them are beyond use."""

from __future__ import annotations

import numpy as np

from lamina.errors import ImageCorrupt
from lamina.formats.qcow2.arrays import read_words
from lamina.formats.qcow2.bitmap_layout import (
    IN_USE,
    TABLE_ALL_ONES,
    TABLE_OFFSET_MASK,
    TABLE_RESERVED,
    BitmapEntry,
    check_entry,
    check_loadable,
)
from lamina.formats.qcow2.bitmap_storage import read_directory
from lamina.formats.qcow2.entries import beyond
from lamina.formats.qcow2.layout import AUTOCLEAR_BITMAPS
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.formats.qcow2.arrays import Indices
    from lamina.formats.qcow2.references import Walk


class BitmapWalk:
    """The part of a ``Walk`` that goes through the bitmap directory.

    Where errors are to be repaired a damaged bitmap is as good as removed: nothing of it is
    counted, and ``kept`` are those that a new directory has to list.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._removes = walk.findings.mends and walk.l1_usable
        self.kept: list[BitmapEntry] = []
        self.damages = 0
        """How many were found; if there are any, not all bitmaps are kept."""

    def run(self) -> None:
        walk, extension = self._walk, self._walk.header.bitmaps
        if extension is None or not walk.header.autoclear_features & AUTOCLEAR_BITMAPS:
            return
        offset, size = extension.directory_offset, extension.directory_size
        if offset + size - walk.file_size >= walk.cluster_size:
            self._damaged(beyond(offset, size))
            return
        walk.count_region(offset, size)
        try:
            entries = list(read_directory(walk.file, extension))
        except ImageCorrupt as error:
            self._damaged(f" bitmap directory: {error}")
            return
        names: set[str] = set()
        tables = 0
        for index, entry in enumerate(entries):
            try:
                check_entry(entry, index, walk.header)
                if not entry.flags & IN_USE:
                    check_loadable(entry, index, walk.header)
            except ImageCorrupt as error:
                self._damaged(f" bitmap directory entry {index}: {error}")
                continue
            if entry.name in names:
                self._damaged(
                    f" bitmap directory entry {index}: Bitmap already exists: {entry.name}"
                )
                continue
            names.add(entry.name)
            tables += entry.table_size * 8
            if tables > walk.file_size:
                self._damaged(f" bitmap '{entry.name}': all tables are larger than the file")
                continue
            self._bitmap(entry)

    def _damaged(self, *messages: str) -> None:
        for message in messages:
            self._walk.error(message, mended=self._removes)
        self.damages += len(messages)

    def _bitmap(self, entry: BitmapEntry) -> None:
        walk, unit = self._walk, self._walk.cluster_size
        length = entry.table_size * 8
        if entry.table_offset + length - walk.file_size >= unit:
            self._damaged(beyond(entry.table_offset, length))
            return
        problems, clusters = self._table(entry)
        if problems:
            self._damaged(*problems)
            if self._removes:
                return
        else:
            self.kept.append(entry)
        walk.count_region(entry.table_offset, length)
        walk.census.add(clusters)

    def _table(self, entry: BitmapEntry) -> tuple[list[str], Indices]:
        """(what is wrong with the table, the clusters of bits that it names)."""
        walk, unit = self._walk, self._walk.cluster_size
        table = read_words(walk.file, entry.table_offset, entry.table_size)
        places = (table & np.uint64(TABLE_OFFSET_MASK)).astype(np.int64)
        invalid = (table & np.uint64(TABLE_RESERVED)) != 0
        invalid |= (places & (unit - 1)) != 0
        invalid |= (places != 0) & ((table & np.uint64(TABLE_ALL_ONES)) != 0)
        problems = [
            f" bitmap '{entry.name}': table entry {index} is not valid"
            for index in np.flatnonzero(invalid).tolist()
        ]
        outside = (places >= walk.file_size) & ~invalid
        problems += [beyond(place, unit) for place in places[outside].tolist()]
        return problems, places[(places != 0) & ~invalid & ~outside] >> walk.bits
