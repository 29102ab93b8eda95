"""cloop: compressed images of Linux live systems (version 2.0), for reading. Big-endian.

    0     128 bytes  a shell script that mounts the image
    128   u32        bytes of a block, before it was compressed
    132   u32        blocks
    136   u64 …      where each block begins in the file, and where the last one ends

A block is a zlib stream.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from lamina.block.driver import Driver
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.engine.blocktable import BlockTable
from lamina.engine.read_only import ReadOnlyMapping
from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING, Any, NoReturn
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk

_HEADER = struct.Struct(">128xII")
TABLE = _HEADER.size
MAX_BLOCK = 64 << 20
MAX_BLOCKS = 0x1FFFFFFF
MAX_TABLE = 512 << 20
CHECKED_AT_ONCE = 1 << 20
"""Offsets up to which all are looked at when an image is opened; of more, those that are used."""


def parse(head: bytes) -> tuple[int, int]:
    """Bytes of a block, and blocks. Raises ImageCorrupt."""
    if len(head) < TABLE:
        _bad("Image not in cloop format", "block_size", 128)
    block_size, blocks = _HEADER.unpack_from(head)
    if block_size == 0:
        _bad("block_size cannot be zero", "block_size", 128)
    if block_size % SECTOR:
        _bad(f"block_size {block_size} must be a multiple of 512", "block_size", 128)
    if block_size > MAX_BLOCK:
        _bad(f"block_size {block_size} must be 64 MB or less", "block_size", 128)
    if blocks > MAX_BLOCKS:
        _bad(f"n_blocks {blocks} must be {MAX_BLOCKS} or less", "n_blocks", 132)
    if 8 * (blocks + 1) > MAX_TABLE:
        _bad("image requires too many offsets, try increasing block size", "n_blocks", 132)
    return block_size, blocks


class CloopMapping(ReadOnlyMapping):
    driver = "cloop"

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.block_size, self.blocks = parse(self.file.read(0, min(TABLE, self.file.size)))
        self.size = self.block_size * self.blocks
        if TABLE + 8 * (self.blocks + 1) > self.file.size:
            _bad("The offsets lie behind the end of the image", "n_blocks", 132)
        self.offsets = BlockTable(
            self.metadata,
            host_offset=TABLE,
            entries=self.blocks + 1,
            code="Q",
            byteorder="big",
        )
        if self.blocks < CHECKED_AT_ONCE:
            self._places(0, self.blocks)

    def _places(self, first: int, count: int) -> list[int]:
        """Where these blocks begin, and where the last one ends. Raises ImageCorrupt."""
        places: list[int] = []
        for _, offsets in self.offsets.runs(first, count + 1):
            places += offsets
        for index, (start, end) in enumerate(pairwise(places), first + 1):
            if end < start:
                self._bad_offset(
                    f"offsets not monotonically increasing at index {index}, image file is corrupt",
                    index,
                )
            if end - start > 2 * MAX_BLOCK:
                self._bad_offset(
                    f"invalid compressed block size at index {index}, image file is corrupt", index
                )
        return places

    def _bad_offset(self, message: str, index: int) -> NoReturn:
        raise ImageCorrupt(
            message,
            path=self.file.filename,
            format="cloop",
            structure="offsets",
            field=f"entry {index}",
            offset=TABLE + 8 * index,
        )

    def resolve(self, offset: int, length: int) -> list[Extent]:
        unit = self.block_size
        end = offset + length
        first = offset // unit
        places = self._places(first, -(-end // unit) - first)
        extents = []
        for block, (place, stop) in enumerate(pairwise(places), first):
            start = block * unit
            low, high = max(start, offset), min(start + unit, end)
            extents.append(
                Extent(
                    low,
                    high - low,
                    Kind.ENCODED,
                    self.file,
                    place,
                    stored_length=stop - place,
                    codec="zlib-stream",
                    unit_offset=start,
                    unit_length=unit,
                )
            )
        return extents

    def info(self) -> NodeInfo:
        actual_size = self.file.info().actual_size
        return NodeInfo(self.disk.filename, "cloop", self.size, actual_size, dirty=None)


def _bad(message: str, field: str, offset: int) -> NoReturn:
    raise ImageCorrupt(message, format="cloop", structure="header", field=field, offset=offset)


class CloopDriver(Driver):
    name = "cloop"
    is_format = True

    def open(self, options: Any, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk

        return Disk(context, CloopMapping)


DRIVER = CloopDriver()
