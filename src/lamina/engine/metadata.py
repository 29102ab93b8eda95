"""Metadata on its way to storage: ordering edges stated once, for all formats.

A change of a format's tables is several writes that must not reach the disk in the wrong order. A
format says for each write which *stage* it belongs to; ``commit`` writes the stages in order with a
flush of the file between them:

    COUNTS   space is taken: refcounts up, allocation bitmaps, the tables that hold them
    TABLES   tables whose entries name data (the data itself was written before)
    ROOTS    what names the tables: upper tables, header fields
    FREES    space is given back: refcounts down

A crash between any two writes then leaves at most space that nobody names.
"""

from __future__ import annotations

import enum


class Stage(enum.IntEnum):
    COUNTS = 0
    TABLES = 1
    ROOTS = 2
    FREES = 3


class Metadata:
    """Filled in by the engine's author: see the module's text."""

    def commit(self) -> None:
        raise NotImplementedError
