"""Check and repair of VHD images (QEMU has none): footers, header, and a place for every block."""

from __future__ import annotations

import numpy as np

from lamina.block.driver import CheckResult, Fix
from lamina.engine.appending import copy_within
from lamina.formats.vpc.layout import FOOTER_SIZE, FREE, HEADER_SIZE, has_checksum
from lamina.formats.vpc.mapping import DynamicMapping, VpcMapping
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable


def check(mapping: VpcMapping, fix: Fix, report: Callable[[str], None]) -> CheckResult:
    """Fixed images have nothing but their footer, which was found when they were opened."""
    work = _Check(mapping, fix, report)
    if isinstance(mapping, DynamicMapping):
        work.footers(mapping)
        work.header(mapping)
        work.blocks(mapping)
        work.end(mapping)
        mapping.metadata.commit()
        mapping.metadata.barrier()
    return work.result


class _Check:
    def __init__(self, mapping: VpcMapping, fix: Fix, report: Callable[[str], None]) -> None:
        self.file = mapping.file
        self.fix = fix
        self.report = report
        self.result = CheckResult()

    def _wrong(self, finding: str) -> bool:
        """Count and tell a finding; whether it is to be repaired."""
        self.report(f"ERROR: {finding}")
        if self.fix.errors:
            self.result.corruptions_fixed += 1
            return True
        self.result.corruptions += 1
        return False

    def footers(self, mapping: DynamicMapping) -> None:
        footer = mapping.footer.pack()
        if self.file.read(0, FOOTER_SIZE) != footer and self._wrong(
            "the copy of the footer at the beginning of the file is damaged"
        ):
            self.file.write(0, footer)
        last = self.file.read(self.file.size - FOOTER_SIZE, FOOTER_SIZE)
        if last != footer and self._wrong("the footer at the end of the file is damaged"):
            mapping.trailer.touch()

    def header(self, mapping: DynamicMapping) -> None:
        place = mapping.footer.data_offset
        if not has_checksum(self.file.read(place, HEADER_SIZE), 36) and self._wrong(
            "the checksum of the dynamic header is wrong"
        ):
            self.file.write(place, mapping.header.pack())

    def blocks(self, mapping: DynamicMapping) -> None:
        """Every block has a place of its own, which holds no metadata."""
        header = mapping.header
        self.result.total_clusters = -(-mapping.size // mapping.unit)
        guest, starts = _places(mapping)
        metadata = (starts < FOOTER_SIZE + HEADER_SIZE) | (
            (starts < header.table_end) & (starts + mapping.block_bytes > header.table_offset)
        )
        for at in np.flatnonzero(metadata).tolist():
            place = int(starts[at])
            if self._wrong(f"block {int(guest[at])} lies at {place:#x}, in the metadata"):
                mapping.table[int(guest[at])] = FREE
        guest, starts = guest[~metadata], starts[~metadata]
        self.result.allocated_clusters = len(guest)
        apart = np.diff(starts) != mapping.block_bytes
        self.result.fragmented_clusters = int(np.count_nonzero(apart))
        order = np.argsort(starts, kind="stable")
        taken = 0
        for at in order.tolist() if (np.diff(starts[order]) < mapping.block_bytes).any() else ():
            block, place = int(guest[at]), int(starts[at])
            if place < taken:
                if self._wrong(f"block {block} at {place:#x} overlaps another one"):
                    _part(mapping, block, place)
            else:
                taken = place + mapping.block_bytes

    def end(self, mapping: DynamicMapping) -> None:
        """What lies between the last block and the footer, in blocks."""
        leaked = (self.file.size - FOOTER_SIZE - mapping.appender.end) // mapping.block_bytes
        if leaked <= 0:
            return
        if self.fix.leaks:
            mapping.trailer.touch()
            mapping.metadata.commit()
            mapping.metadata.barrier()
            mapping.appender.trim(keep=FOOTER_SIZE)
            self.result.leaks_fixed = leaked
        else:
            self.result.leaks = leaked


def _places(
    mapping: DynamicMapping,
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Guest blocks that are in the file, and the host offsets where they begin."""
    guest = [np.zeros(0, dtype=np.int64)]
    starts = [np.zeros(0, dtype=np.int64)]
    for first, entries in mapping.table.columns(0, mapping.header.max_table_entries):
        here = np.flatnonzero(entries != FREE)
        guest.append(first + here)
        starts.append(entries[here] * SECTOR)
    return np.concatenate(guest), np.concatenate(starts)


def _part(mapping: DynamicMapping, block: int, place: int) -> None:
    """Nobody knows whose the shared bytes are: each block gets what is there."""
    length = mapping.block_bytes
    target, _ = mapping.appender.take(length, SECTOR)
    mapping.appender.reach(mapping.appender.end)
    copy_within(mapping.file, place, target, length)
    mapping.metadata.data_written(mapping.file)
    mapping.table[block] = target // SECTOR
    mapping.trailer.touch()
    mapping.metadata.relieve()
