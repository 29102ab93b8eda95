"""Changing the size of a disk: of its last extent, and of how many there are.

What grows is made first and named last; what shrinks loses its name first.
"""

from __future__ import annotations

import errno
import sys
from contextlib import suppress

from lamina.block.limits import Preallocation
from lamina.engine.metadata import Stage
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.formats.vmdk.create import MAX_EXTENT, base_name, extent_name, words, write_sparse
from lamina.formats.vmdk.descriptor import FLAT, SPARSE, ExtentLine
from lamina.formats.vmdk.extents import FlatExtent, VmdkExtent
from lamina.formats.vmdk.layout import (
    ENTRY_SIZE,
    HEADER_FIELDS,
    MAX_DIRECTORY_ENTRIES,
    SparseHeader,
)
from lamina.formats.vmdk.opening import extent_of_line
from lamina.formats.vmdk.sparse import SparseExtent
from lamina.formats.vmdk.stream import StreamExtent, spare_directory
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import PAGE, SECTOR, round_down, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.vmdk.mapping import VmdkMapping

_NAMES = 1000
"""Names that are tried for a new file."""


def resize(mapping: VmdkMapping, size: int, preallocation: Preallocation) -> None:
    """Raises UsageError, ImageUnsupported, StorageError; then the size is what it was."""
    if size % SECTOR:
        raise UsageError("The new size must be a multiple of 512")
    if size == 0:
        raise UsageError("A disk of no size is none")
    if preallocation is not Preallocation.OFF and not mapping.fixed:
        raise ImageUnsupported(f"Unsupported preallocation mode '{preallocation.value}'")
    if size > mapping.size:
        _grow(mapping, size, preallocation)
    elif size < mapping.size:
        _shrink(mapping, size)
    mapping.metadata.commit()
    mapping.metadata.barrier()


# -- more ------------------------------------------------------------------------------------------


def _grow(mapping: VmdkMapping, size: int, preallocation: Preallocation) -> None:
    last = mapping.extents[-1]
    split = mapping.descriptor.create_type.startswith("twoGb")
    most = MAX_EXTENT if split else size
    length = max(min(size - last.start, most), last.length)
    _check_backing(mapping, size)
    if length > last.length:
        _lengthen(mapping, last, length, preallocation)
    if last.end < size:
        _append_extents(mapping, size, preallocation)
    mapping.settle()


def _check_backing(mapping: VmdkMapping, size: int) -> None:
    """What is below must not show in new space. Raises ImageUnsupported."""
    backing = mapping.disk.backing
    if backing is not None and backing.size > mapping.size:
        raise ImageUnsupported("A disk cannot grow upon a backing file that is longer")


def _lengthen(
    mapping: VmdkMapping, extent: VmdkExtent, length: int, preallocation: Preallocation
) -> None:
    if isinstance(extent, FlatExtent):
        assert extent.node is not None
        extent.node.truncate(extent.host_offset + length, preallocation, zeroed=True)
    elif isinstance(extent, StreamExtent):
        _lengthen_stream(extent, length)
    elif isinstance(extent, SparseExtent):
        _lengthen_sparse(extent, length)
    else:
        raise ImageUnsupported("Image format driver does not support resize")
    extent.length = length
    _describe(mapping, len(mapping.extents) - 1, length)
    mapping.metadata.commit()
    mapping.metadata.barrier()
    if isinstance(extent, SparseExtent):
        # Chunks of it had other lengths.
        extent.directory.drop_clean()


def _lengthen_sparse(extent: SparseExtent, length: int) -> None:
    """New tables for the new space, and directories that name them: new ones if they need room."""
    old = extent.header
    header = replace(old, capacity=length)
    before, after = old.directory_entries, header.directory_entries
    if after > MAX_DIRECTORY_ENTRIES:
        raise UsageError("L1 size too big")
    room = round_up(before * ENTRY_SIZE, SECTOR)
    size = round_up(after * ENTRY_SIZE, SECTOR)
    places = {"directory_offset": old.directory_offset}
    if old.has_redundant:
        places["redundant_offset"] = old.redundant_offset
    for name, place in places.items():
        entries = extent.node.read(place, before * ENTRY_SIZE)
        entries += _new_tables(extent, after - before)
        if size > room:
            if place >= old.overhead:
                _drop(extent, [(place, round_up(room, extent.grain))])
            place = places[name] = extent.space.append(size, extent.grain)
        extent.metadata.put(Stage.TABLES, place, entries, node=extent.node)
    _replace_header(extent, replace(header, **places))


def _new_tables(extent: SparseExtent, count: int) -> bytes:
    """Entries that name so many new tables, which are empty."""
    if not count:
        return b""
    size = round_up(extent.header.table_bytes, SECTOR)
    first = extent.space.append(count * size, extent.grain)
    extent.node.write_zeroes(first, count * size)
    extent.metadata.data_written(extent.node)
    return words(range(first // SECTOR, (first + count * size) // SECTOR, size // SECTOR))


def _lengthen_stream(extent: StreamExtent, length: int) -> None:
    """There are no tables without grains; but the directory must have room where it is."""
    old = extent.header
    header = replace(old, capacity=length)
    if spare_directory(header) != old.directory_offset:
        raise ImageUnsupported("The directory of this stream has no room for more")
    place = old.directory_offset + old.directory_entries * ENTRY_SIZE
    missing = (header.directory_entries - old.directory_entries) * ENTRY_SIZE
    if missing:
        extent.metadata.put(Stage.TABLES, place, bytes(missing), node=extent.node)
    _replace_header(extent, header)


def _replace_header(extent: SparseExtent, header: SparseHeader) -> None:
    extent.metadata.put(Stage.ROOTS, 0, header.pack()[:HEADER_FIELDS], node=extent.node)
    extent.header = header


def _append_extents(mapping: VmdkMapping, size: int, preallocation: Preallocation) -> None:
    """Files beside the others, each as large as can be."""
    pattern = mapping.descriptor.extents[-1]
    if pattern.type not in (FLAT, SPARSE):
        raise ImageUnsupported("Image format driver does not support resize")
    disk = mapping.disk
    lines = list(mapping.descriptor.extents)
    last = mapping.extents[-1]
    zeroed = isinstance(last, SparseExtent) and last.header.zeroed_grains
    start = last.end
    added: list[VmdkExtent] = []
    while start < size:
        number = len(lines)
        line = ExtentLine("RW", min(MAX_EXTENT, size - start), pattern.type, "")
        node, line = _new_file(mapping, number, line)
        if line.type == SPARSE:
            write_sparse(node, line.length, b"", zeroed=zeroed)
        else:
            node.truncate(line.length, preallocation, zeroed=True)
        node.flush()
        disk.attach(f"extents.{number}", node)
        added.append(
            extent_of_line(
                start,
                line,
                node,
                mapping.metadata,
                writable=True,
                backed=bool(mapping.backing_name),
            )
        )
        lines.append(line)
        start += line.length
    last.is_last = False
    for extent in added[:-1]:
        extent.is_last = False
    mapping.extents += added
    mapping.put_descriptor(mapping.descriptor.with_extents(lines))


def _new_file(mapping: VmdkMapping, number: int, line: ExtentLine) -> tuple[Node, ExtentLine]:
    """A file for extent ``number``, under the first name that is not taken."""
    kind = "f" if line.type == FLAT else "s"
    stem = base_name(mapping.file.filename)
    for suffix in range(number + 1, number + _NAMES):
        name = extent_name(stem, f"-{kind}{suffix:03}")
        try:
            node = mapping.context.create_part(
                f"extents.{number}", name, relative_to=mapping.disk
            )
        except StorageError as error:
            if error.errno == errno.EEXIST:
                continue
            raise
        return node, line._replace(name=name)
    raise StorageError.from_errno(errno.EEXIST)


def _describe(mapping: VmdkMapping, number: int, length: int) -> None:
    """Let the descriptor say how long an extent is."""
    lines = list(mapping.descriptor.extents)
    if not mapping.source.is_cowd and number < len(lines):
        lines[number] = lines[number]._replace(length=length)
        mapping.put_descriptor(mapping.descriptor.with_extents(lines))


# -- less ------------------------------------------------------------------------------------------


def _tables(extent: SparseExtent, first: int) -> list[tuple[int, int]]:
    """Places of the tables from this one on, and of their copies, that are not in front of the
    first grain: (host offset, bytes)."""
    header = extent.header
    found = []
    for number in range(first, header.directory_entries):
        found += [extent.table_offset(number), extent.copy_offset(number)]
    return [(offset, header.table_bytes) for offset in found if offset >= header.overhead]


def _shrink(mapping: VmdkMapping, size: int) -> None:
    kept = [extent for extent in mapping.extents if extent.start < size]
    dropped = mapping.extents[len(kept) :]
    last = kept[-1]
    length = size - last.start
    if isinstance(last, SparseExtent):
        if last.compressed:
            raise ImageUnsupported("Compressed grains cannot be cut off")
        edge = last.start + round_up(length, last.grain)
        if edge < last.end:
            last.forget(edge, last.end - edge)
        header = replace(last.header, capacity=length)
        _drop(last, _tables(last, header.directory_entries))
        _replace_header(last, header)
    elif not isinstance(last, FlatExtent):
        raise ImageUnsupported("Image format driver does not support resize")
    last.length = length
    last.is_last = True
    lines = list(mapping.descriptor.extents[: len(kept)])
    lines[-1] = lines[-1]._replace(length=length)
    mapping.extents = kept
    mapping.put_descriptor(mapping.descriptor.with_extents(lines))
    mapping.metadata.commit()
    mapping.metadata.barrier()
    if isinstance(last, SparseExtent):
        last.directory.drop_clean()
    elif last.node is not None:
        last.node.truncate(last.host_offset + length)
    # Their names are gone. The files stay: nobody said that they may be removed.
    for number, extent in enumerate(dropped, len(kept)):
        if extent.node is not None:
            extent.node.truncate(0)
            mapping.disk.replace_child(f"extents.{number}", None)
    mapping.settle()


def _drop(extent: SparseExtent, places: list[tuple[int, int]]) -> None:
    """Space that held tables, as (host offset, bytes), takes no room any more once nobody can find
    it; it is not used again."""
    if places:
        extent.metadata.when_durable(lambda: _punch(extent, places))


def _punch(extent: SparseExtent, places: list[tuple[int, int]]) -> None:
    for offset, _ in places:
        extent.tables.drop(offset)
        extent.copies.drop(offset)
    numbers = range(extent.header.directory_entries)
    used = {extent.table_offset(number) for number in numbers}
    used.update(extent.copy_offset(number) for number in numbers)
    start = end = 0
    for offset, length in [*sorted(places), (sys.maxsize, 0)]:
        if offset != end:
            _discard_pages(extent.node, start, end, used)
            start = offset
        end = offset + length


def _discard_pages(node: Node, start: int, end: int, used: set[int]) -> None:
    """Let go of a range and, where no table that is ``used`` shares them, of the rest of the pages
    at its ends: file systems free whole ones."""
    low, high = round_down(start, PAGE), round_up(end, PAGE)
    start = low if used.isdisjoint(range(low, start, SECTOR)) else start
    end = high if used.isdisjoint(range(end, high, SECTOR)) else end
    if end > start:
        with suppress(LaminaError):
            node.discard(start, end - start)
