"""COPIED flags: set where the refcount of what an entry of the active tables names is exactly one.

A flag too many lets a snapshot's data be overwritten, one too few costs a copy.
"""

from __future__ import annotations

import numpy as np

from lamina.formats.qcow2.arrays import (
    Counts,
    Indices,
    Mask,
    TableRun,
    Words,
    read_tables,
    read_words,
)
from lamina.formats.qcow2.census import count_uses
from lamina.formats.qcow2.entries import Entries
from lamina.formats.qcow2.layout import COPIED, OFFSET_MASK
from lamina.hints import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.references import Findings

_COPIED = np.uint64(COPIED)


class Lookup(Protocol):
    """Refcounts, as they will be after the repair."""

    def look_up(self, clusters: Indices) -> tuple[Counts, Mask | None]:
        """(their counts, which of them are known; None: all)."""


def check_copied(
    file: Node, header: Header, counts: Lookup, findings: Findings | None, *, fixes: bool
) -> bool:
    """Compare all flags, and set them right with ``fixes``. Whether anything was written.

    ``findings`` hears of each that is wrong; None where they are known to be.
    """
    return _CopiedCheck(file, header, counts, findings, fixes).run()


class _CopiedCheck:
    def __init__(
        self, file: Node, header: Header, counts: Lookup, findings: Findings | None, fixes: bool
    ) -> None:
        self.file = file
        self.header = header
        self.counts = counts
        self.findings = findings
        self.fixes = fixes
        self.wrote = False
        self._l1_findings: dict[int, str] = {}
        """By index in the table: what is still to be reported."""

    def run(self) -> bool:
        header = self.header
        l1 = read_words(self.file, header.l1_table_offset, header.l1_size)
        present = np.flatnonzero(l1)
        entries = l1[present]
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        counts, known = self.counts.look_up(offsets >> header.cluster_bits)
        wrong = ((counts == 1) != ((entries & _COPIED) != 0)) & (offsets != 0)
        if known is not None:
            wrong &= known
        for index, entry, count in zip(
            present[wrong].tolist(), entries[wrong].tolist(), counts[wrong].tolist(), strict=True
        ):
            if self.findings is None:
                break
            self._l1_findings[index] = (
                f" OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
            )
        usable = (offsets < self.file.size) & (offsets != 0)
        usable &= (offsets & (header.cluster_size - 1)) == 0
        rows, tables = present[usable], offsets[usable]
        # A table that several entries name needs to be looked at but once.
        first_uses, _ = count_uses(tables)
        rows, tables = rows[first_uses], tables[first_uses]
        for run in read_tables(self.file, tables, header.cluster_size):
            self._l2_run(run, rows[run.first : run.first + len(run.offsets)])
        self._report_l1(len(l1))
        if self.fixes and wrong.any():
            l1[present[wrong]] ^= _COPIED
            self._write(header.l1_table_offset, l1)
        return self.wrote

    def _report_l1(self, end: int) -> None:
        """What was found about entries before ``end``."""
        if self.findings is None:
            return
        for index in [index for index in self._l1_findings if index < end]:
            self.findings.corruption(self._l1_findings.pop(index), mended=self.fixes)

    def _l2_run(self, run: TableRun, l1_indices: Indices) -> None:
        entries = Entries(self.header, self.file.size, run.entries)
        positions = np.flatnonzero(entries.allocated)
        words = entries.words[positions]
        if entries.data_file:
            # Nobody counts the clusters of a data file: each belongs to one entry.
            counts: Counts = np.ones(len(words), dtype=np.uint16)
            known = None
        else:
            places = entries.offsets[positions] >> np.uint64(self.header.cluster_bits)
            counts, known = self.counts.look_up(places.view(np.int64))
        wrong = (counts == 1) != ((words & _COPIED) != 0)
        if known is not None:
            wrong &= known
        if not wrong.any():
            return
        table = positions[wrong] // self.header.l2_entries
        if self.findings is not None:
            for row, word, count in zip(
                table.tolist(), words[wrong].tolist(), counts[wrong].tolist(), strict=True
            ):
                self._report_l1(int(l1_indices[row]) + 1)
                self.findings.corruption(
                    f" OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}",
                    mended=self.fixes,
                )
        if self.fixes:
            # A view of the run, of every other word where entries are two words long.
            entries.words[positions[wrong]] ^= _COPIED
            for row in np.unique(table).tolist():
                self._write(int(run.offsets[row]), run.entries[row])

    def _write(self, offset: int, words: Words) -> None:
        data = words.astype(">u8").tobytes()
        self.file.write(offset, data[: max(self.file.size - offset, 0)])
        self.wrote = True
