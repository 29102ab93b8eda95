"""A look at the whole BAT: which clusters are in use, and which entries break the rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass, field

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.engine.blocktable import BlockTable
    from lamina.formats.parallels.layout import Header

MANY = 1 << 16
"""Entries from which on it pays to load numpy."""


@dataclass
class Survey:
    used: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of host bytes that sound entries name, ascending and apart."""
    outside: list[int] = field(default_factory=list)
    """Entries whose cluster is not wholly in the file, or not behind the BAT."""
    duplicate: list[int] = field(default_factory=list)
    """Entries that share a place, or a part of one, with an earlier one; not in ``outside``."""
    allocated: int = 0
    """Entries in use, ``duplicate`` included."""
    fragmented: int = 0
    """Of these, those that do not follow the one before in the file."""

    @property
    def is_sound(self) -> bool:
        return not (self.outside or self.duplicate)


def survey(table: BlockTable, header: Header, file_size: int) -> Survey:
    if table.entries >= MANY:
        return _survey_columns(table, header, file_size)
    unit, scale = header.cluster_size, header.entry_scale
    result = Survey()
    places: list[tuple[int, int]] = []
    last = -1  # where the next cluster of the disk would follow
    for index, entries in table.runs(0, table.entries):
        for block, entry in enumerate(entries, index):
            if not entry:
                last = -1
                continue
            place = entry * scale
            if place < header.table_end or place + unit > file_size:
                result.outside.append(block)
                last = -1
                continue
            places.append((place, block))
            result.fragmented += last not in (-1, place)
            last = place + unit
    result.allocated = len(places)
    places.sort()
    _sort_out(result, places, unit)
    return result


def _sort_out(result: Survey, places: Iterable[tuple[int, int]], unit: int) -> None:
    """Duplicates and runs; ``places`` are (host offset, block), in order."""
    kept: list[int] = []
    owner = 0
    for place, block in places:
        if kept and place < kept[-1] + unit:
            if block > owner:
                result.duplicate.append(block)
                continue
            result.duplicate.append(owner)
            kept.pop()
        kept.append(place)
        owner = block
    result.duplicate.sort()
    result.used += runs(kept, unit)


def runs(places: list[int], unit: int) -> Iterator[tuple[int, int]]:
    """(start, end) of clusters at ``places``, ascending, those that adjoin as one."""
    start = end = -1
    for place in places:
        if place != end:
            if end > start:
                yield start, end
            start = place
        end = place + unit
    if end > start:
        yield start, end


def _survey_columns(table: BlockTable, header: Header, file_size: int) -> Survey:
    """The same for large tables."""
    import numpy as np

    unit = header.cluster_size
    result = Survey()
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    before = 0  # the last place of the chunk before, 0 if there is none
    for index, entries in table.columns(0, table.entries):
        place = entries * header.entry_scale
        here = place != 0
        outside = here & ((place < header.table_end) | (place + unit > file_size))
        result.outside += (index + np.flatnonzero(outside)).tolist()
        here &= ~outside
        place[~here] = 0
        last = np.concatenate(([before], place[:-1]))
        result.fragmented += int(
            np.count_nonzero(here & (last != 0) & (last + unit != place))
        )
        before = int(place[-1])
        blocks = np.flatnonzero(here)
        found.append((place[blocks], index + blocks))
    places, blocks = (np.concatenate(column) for column in zip(*found, strict=True))
    result.allocated = len(blocks)
    order = np.argsort(places, kind="stable")
    places, blocks = places[order], blocks[order]
    gaps = np.diff(places)
    if np.any((gaps > 0) & (gaps < unit)):
        # Clusters that overlap in part: rare, and not worth a second way.
        _sort_out(result, zip(places.tolist(), blocks.tolist(), strict=True), unit)
        return result
    first = np.append(True, gaps != 0)[: len(places)]
    result.duplicate = np.sort(blocks[~first]).tolist()
    places = places[first]
    begins = np.append(True, np.diff(places) != unit)[: len(places)]
    starts = places[begins]
    ends = np.append(places[:-1][begins[1:]], places[-1:]) + unit
    result.used = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return result
