"""Moving blocks in the file, so that those in use have no gaps between them or leave its start.

Whatever is moved is copied first, and durable before its map entry names the new place; the old
place is used for something else only when the entry is durable and nobody reads there any more.
"""

from __future__ import annotations

import numpy as np

from lamina.engine.appending import copy_within
from lamina.engine.metadata import Stage
from lamina.formats.vdi.layout import BLOCK
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy.typing as npt

    from lamina.formats.vdi.mapping import VdiMapping


def used(mapping: VdiMapping) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Guest blocks that are in the file, and which blocks of the file they are."""
    guest: list[npt.NDArray[np.int64]] = []
    places: list[npt.NDArray[np.int64]] = []
    for first, entries in mapping.table.columns(0, mapping.header.blocks_in_image):
        here = np.flatnonzero(~np.isin(entries, list(mapping.special)))
        guest.append(first + here)
        places.append(entries[here])
    nothing = np.zeros(0, dtype=np.int64)
    return np.concatenate([nothing, *guest]), np.concatenate([nothing, *places])


def compact(mapping: VdiMapping) -> None:
    """Let blocks from the end fill the gaps, then cut the file.

    With the disk to itself, and a map that names no block twice.
    """
    settle(mapping)
    guest, places = used(mapping)
    count = len(places)
    taken = np.zeros(count, dtype=bool)
    taken[places[places < count]] = True
    gaps = np.flatnonzero(~taken)
    movers = np.flatnonzero(places >= count)
    for mover, gap in zip(movers.tolist(), gaps.tolist(), strict=True):
        move(mapping, int(guest[mover]), int(places[mover]), gap)
    settle(mapping)
    mapping.find_end()
    mapping.set_allocated(count, Stage.FREES)
    mapping.metadata.commit()
    mapping.appender.trim()


def move(mapping: VdiMapping, block: int, place: int, target: int) -> None:
    """A guest block to another block of the file."""
    base = mapping.base
    copy_within(mapping.file, base + place * BLOCK, base + target * BLOCK, BLOCK)
    mapping.metadata.data_written(mapping.file)
    mapping.table[block] = target
    mapping.metadata.relieve()


def settle(mapping: VdiMapping) -> None:
    """All tables are durable, and no read is in flight that knows older ones."""
    mapping.metadata.commit()
    mapping.metadata.barrier()
    mapping.disk.drain_reads()
