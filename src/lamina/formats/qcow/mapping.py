"""Where guest bytes live in a qcow image: two levels of tables, everything appended at the end.

Nothing is ever freed: there are no counts, only references. Data is written first, then the L2
entry that names it, then the L1 entry that names a new L2 table.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections.abc import Iterator, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.filenames import full_backing_filename
from lamina.block.info import NodeInfo
from lamina.engine.coalescing import append_extent
from lamina.engine.mapping import Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.engine.tables import TableCache
from lamina.errors import ImageCorrupt, StorageError
from lamina.formats.qcow import layout
from lamina.formats.qcow.layout import COMPRESSED, SIZE, Header, parse
from lamina.formats.qcow.writing import QcowReservation
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.extents import Cipher
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.formats.qcow.options import QcowOptions

_ENTRY = struct.Struct(">Q")
L2_CACHE_BYTES = 16 << 20
L1_CHUNK = 1 << 20
"""Bytes of the L1 table that are kept as one block: a huge, sparse one is not loaded as a whole."""


class QcowMapping(Mapping):
    driver = "qcow"
    codec = "zlib"

    def __init__(self, disk: Disk, options: QcowOptions, context: OpenContext) -> None:
        self.disk = disk
        self.file: Node = disk.file
        head = self.file.read(0, min(SIZE, self.file.size))
        self.header: Header = parse(head)
        self.size = self.header.size
        self.unit = self.encoded_unit = self.header.cluster_size
        self.metadata = Metadata(self.file)
        self.l2_tables = TableCache(
            self.metadata,
            table_bytes=8 * self.header.l2_entries,
            capacity=L2_CACHE_BYTES,
            stage=Stage.TABLES,
            name="L2 table cache",
        )
        self.l1_chunks = TableCache(
            self.metadata,
            table_bytes=L1_CHUNK,
            capacity=4 * L1_CHUNK,
            stage=Stage.ROOTS,
            name="L1 table",
        )
        if self.header.l1_offset + 8 * self.header.l1_entries > self.file.size:
            raise ImageCorrupt(
                "L1 table lies behind the end of the image",
                format="qcow",
                structure="header",
                field="l1_table_offset",
                offset=40,
            )
        self.end = self.file.size
        """Where the next allocation begins, before it is aligned."""
        self.touched = self.end
        """Nothing was ever written behind this: it reads as zeroes."""
        self.backing_name = self._read_backing_name()
        self.cipher: Cipher | None = None
        if self.header.crypt_method == layout.CRYPT_AES:
            self.request_alignment = SECTOR
            self.encoded_unit = 0
            if not context.locked:
                from lamina.formats.qcow.encryption import aes_cipher

                self.cipher = aes_cipher(options, context)
        if self.backing_name:
            backing = context.open_named(
                "backing", self.backing_name, driver=None, relative_to=disk
            )
            if backing is not None:
                disk.attach("backing", backing)

    def _read_backing_name(self) -> str | None:
        header = self.header
        if not header.backing_offset:
            return None
        if header.backing_offset + header.backing_length > self.file.size:
            raise ImageCorrupt(
                "Backing file name lies behind the end of the image",
                format="qcow",
                structure="header",
                field="backing_file_offset",
                offset=8,
            )
        name = self.file.read(header.backing_offset, header.backing_length)
        return name.decode("utf-8", "surrogateescape")

    # -- tables ----------------------------------------------------------------------------------

    def _l1_place(self, index: int) -> tuple[int, int, int]:
        """(host offset of the chunk, its length, where the entry is in it)."""
        at = 8 * index
        start = at // L1_CHUNK * L1_CHUNK
        length = min(L1_CHUNK, 8 * self.header.l1_entries - start)
        return self.header.l1_offset + start, length, at - start

    def _l2_offset(self, l1_index: int) -> int:
        """Host offset of an L2 table; 0: there is none."""
        if l1_index >= self.header.l1_entries:
            return 0
        chunk, length, at = self._l1_place(l1_index)
        offset: int = _ENTRY.unpack_from(self.l1_chunks.get(chunk, length), at)[0]
        if offset and not SIZE <= offset <= self.end - 8:
            raise ImageCorrupt(
                f"L2 table offset {offset:#x} lies outside of the image",
                path=self.file.filename,
                format="qcow",
                structure="L1 table",
                field=f"entry {l1_index}",
                offset=chunk + at,
            )
        return offset

    def _entries(self, cluster: int, count: int) -> Iterator[tuple[int, int, array[int] | None]]:
        """(first cluster, clusters, L2 entries) of runs that cover these clusters, a table at a
        time; None: there is no table."""
        per_table = self.header.l2_entries
        while count:
            l1_index, index = divmod(cluster, per_table)
            run = min(count, per_table - index)
            offset = self._l2_offset(l1_index)
            table = None
            if offset:
                table = array("Q", self.l2_tables.get(offset)[8 * index : 8 * (index + run)])
                table.byteswap()
            yield cluster, run, table
            cluster += run
            count -= run

    def _runs(self, cluster: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(first cluster, clusters, first entry) of runs that are absent, that lie one behind the
        other, or that are a single compressed cluster."""
        unit = self.unit
        for first, total, entries in self._entries(cluster, count):
            if entries is None or not any(entries):
                yield first, total, 0
                continue
            start, opening, expected, step = 0, entries[0], entries[0], 0
            for number, entry in enumerate(entries):
                if entry == expected and number > start:
                    expected += step
                    continue
                if number > start:
                    yield first + start, number - start, opening
                start, opening = number, entry
                # A compressed cluster is never followed by what it would be if it were not.
                step = unit if entry and not entry & COMPRESSED else 0
                expected = -1 if entry & COMPRESSED else entry + step
            yield first + start, total - start, opening

    # -- reading ---------------------------------------------------------------------------------

    def resolve(self, offset: int, length: int) -> list[Extent]:
        unit = self.unit
        end = offset + length
        first = offset // unit
        extents: list[Extent] = []
        for cluster, count, entry in self._runs(first, -(-end // unit) - first):
            extent = self._extent(cluster * unit, count * unit, entry)
            append_extent(extents, extent)
        if extents:
            extents[0] = extents[0].cut(offset, extents[0].end)
            extents[-1] = extents[-1].cut(extents[-1].guest_offset, end)
        return extents

    def _extent(self, guest_offset: int, length: int, entry: int) -> Extent:
        if not entry:
            return Extent(guest_offset, length, Kind.BELOW)
        if entry & COMPRESSED:
            host_offset, stored = layout.compressed_place(self.header, entry)
            return Extent(
                guest_offset,
                length,
                Kind.ENCODED,
                self.file,
                host_offset,
                stored_length=stored,
                codec=self.codec,
                unit_offset=guest_offset,
                unit_length=length,
            )
        self._check_places(guest_offset, length, entry)
        return Extent(
            guest_offset,
            length,
            Kind.DATA,
            self.file,
            entry,
            cipher=self.cipher,
            first_sector=guest_offset // SECTOR,
        )

    def _check_places(self, guest_offset: int, length: int, host_offset: int) -> None:
        """Clusters lie behind the header and begin in the file. Raises ImageCorrupt."""
        last = host_offset + length - self.unit
        if not SIZE <= host_offset <= last < self.end:
            wrong = last if host_offset >= SIZE else host_offset
            raise ImageCorrupt(
                f"Cluster offset {wrong:#x} lies outside of the image",
                path=self.file.filename,
                format="qcow",
                structure="L2 table",
                field=f"entry of guest offset {guest_offset + wrong - host_offset:#x}",
            )

    # -- writing ---------------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        end_before = self.end
        pieces: list[Piece] = []
        try:
            for offset, length in ranges:
                self._reserve_range(offset, length, pieces)
        except BaseException:
            self.end = end_before
            raise
        return QcowReservation(self, pieces, end_before)

    def _reserve_range(self, offset: int, length: int, pieces: list[Piece]) -> None:
        unit = self.unit
        end = offset + length
        first = offset // unit
        for cluster, count, entry in self._runs(first, -(-end // unit) - first):
            start, stop = cluster * unit, (cluster + count) * unit
            lo, hi = max(start, offset), min(stop, end)
            fresh = not entry or bool(entry & COMPRESSED)
            untouched = fresh and self.end >= self.touched
            if fresh:
                host = self._append(stop - start, unit)
            else:
                self._check_places(start, stop - start, entry)
                host = entry
            pieces.append(
                Piece(
                    lo,
                    hi - lo,
                    self.file,
                    host + lo - start,
                    copy_head=lo - start if fresh else 0,
                    copy_tail=stop - hi if fresh else 0,
                    fresh=fresh,
                    reads_zero=untouched and self.cipher is None,
                    cipher=self.cipher,
                    first_sector=(start if fresh else lo) // SECTOR,
                )
            )

    def reserve_encoded(self, units: Sequence[tuple[int, int]]) -> Reservation:
        end_before = self.end
        pieces = [
            Piece(offset, length, self.file, self._append(length, SECTOR), fresh=True)
            for offset, length in units
        ]
        return QcowReservation(self, pieces, end_before, encoded=True)

    def _append(self, length: int, alignment: int) -> int:
        """Host offset of new space at the end of the file."""
        offset = round_up(self.end, alignment)
        if offset + length > 1 << (63 - self.header.cluster_bits):
            raise StorageError("File too large", errno=errno.EFBIG)
        self.end = offset + length
        self.touched = max(self.touched, self.end)
        return offset

    def publish(self, guest_offset: int, entries: array[int]) -> None:
        """Let L2 entries from this address on name new places, in new tables where there are
        none."""
        cluster = guest_offset // self.unit
        per_table = self.header.l2_entries
        done = 0
        while done < len(entries):
            l1_index, index = divmod(cluster + done, per_table)
            part = array("Q", entries[done : done + per_table - index])
            done += len(part)
            part.byteswap()
            self.l2_tables.update(self._own_table(l1_index), 8 * index, part.tobytes())

    def _own_table(self, l1_index: int) -> int:
        """Host offset of an L2 table, which is made if need be."""
        table = self._l2_offset(l1_index)
        if not table:
            chunk, length, at = self._l1_place(l1_index)
            self.l1_chunks.get(chunk, length)
            self.l1_chunks.hold(chunk, at, _ENTRY.size)
            table = self._append(8 * self.header.l2_entries, self.unit)
            self.l2_tables.new(table, at_once=True)
            self.l1_chunks.update(chunk, at, _ENTRY.pack(table))
        return table

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """Only what is not there and has nothing below it is zero without being written."""
        if self.backing_name:
            return False
        return all(extent.kind is Kind.BELOW for extent in self.resolve(offset, length))

    # -- the whole -------------------------------------------------------------------------------

    def info(self) -> NodeInfo:
        name = self.backing_name
        return NodeInfo(
            self.disk.filename,
            "qcow",
            self.size,
            self.file.info().actual_size,
            cluster_size=self.unit,
            encrypted=self.header.crypt_method != layout.CRYPT_NONE,
            backing_filename=name,
            full_backing_filename=full_backing_filename(self.disk, name) if name else None,
        )
