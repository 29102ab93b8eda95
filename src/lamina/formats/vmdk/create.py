"""A new VMDK: its extents first, then the descriptor that makes a disk of them."""

from __future__ import annotations

import errno
import sys
from array import array

from lamina.errors import StorageError, UsageError
from lamina.formats.vmdk import descriptor as descriptors
from lamina.formats.vmdk.descriptor import FLAT, SPARSE, Descriptor, ExtentLine
from lamina.formats.vmdk.layout import (
    COMPRESS_DEFLATE,
    COMPRESSED,
    DESCRIPTOR_OFFSET,
    DESCRIPTOR_SIZE,
    ENTRY_SIZE,
    GRAIN,
    LINE_ENDINGS_VALID,
    MARKERS,
    MAX_SECTOR,
    REDUNDANT,
    TABLE_ENTRIES,
    ZEROED_GRAINS,
    SparseHeader,
)
from lamina.formats.vmdk.options import ADAPTERS, SUBFORMATS
from lamina.formats.vmdk.stream import trailer
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import GIB, SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.vmdk.options import VmdkCreateOptions

MAX_EXTENT = 2 * GIB
"""Bytes of an extent of a disk that is split."""
STREAM = "streamOptimized"
_TABLE_BYTES = TABLE_ENTRIES * ENTRY_SIZE
_COVERAGE = TABLE_ENTRIES * GRAIN


def create(options: VmdkCreateOptions, file: Node, context: CreateContext) -> None:
    """Raises UsageError, StorageError."""
    subformat = check_options(options)
    size = round_up(options.size, SECTOR)
    if not size:
        # QEMU makes some, and opens none of them.
        raise UsageError("A VMDK image must have a size", field="size")
    parent = _parent(options, context)
    name = base_name(context.filename)
    split = subformat.startswith("twoGb")
    flat = subformat.endswith("Flat")
    lines = []
    if split or flat:
        for number, start in enumerate(range(0, size, MAX_EXTENT) if split else [0], 1):
            length = min(MAX_EXTENT, size - start) if split else size
            line = ExtentLine("RW", length, FLAT if flat else SPARSE, extent_name(
                name, f"-{'f' if flat else 's'}{number:03}" if split else "-flat"
            ))
            write_extent(context, line, zeroed=options.zeroed_grain)
            lines.append(line)
        file.write(0, _descriptor(options, subformat, lines, parent).encoded())
        return
    line = ExtentLine("RW", size, SPARSE, name)
    text = _descriptor(options, subformat, [line], parent).encoded()
    if subformat == STREAM:
        _write_stream(file, size, text)
    else:
        write_sparse(file, size, text, zeroed=options.zeroed_grain)


def check_options(options: VmdkCreateOptions) -> str:
    """The subformat. Raises UsageError."""
    subformat = options.subformat or SUBFORMATS[0]
    if options.adapter_type not in (None, *ADAPTERS):
        raise _invalid("adapter_type", options.adapter_type)
    if options.compat6 and options.hwversion not in (None, "undefined"):
        raise UsageError("compat6 cannot be enabled with hwversion set", field="compat6")
    if subformat not in SUBFORMATS:
        raise _invalid("subformat", subformat)
    if options.backing_file and options.backing_fmt not in (None, "vmdk"):
        raise UsageError("backing_file must be a vmdk image", field="backing_fmt")
    if subformat.endswith("Flat"):
        if options.backing_file:
            raise UsageError("Flat image can't have backing file", field="backing_file")
        if options.zeroed_grain:
            raise UsageError("Flat image can't enable zeroed grain", field="zeroed_grain")
    for key in ("hwversion", "toolsversion"):
        value = getattr(options, key)
        if value and any(character in value for character in '"\r\n\0'):
            raise _invalid(key, value)
    return subformat


def _invalid(key: str, value: str | None) -> UsageError:
    return UsageError(f"invalid parameter value: {value}", field=key)


def _parent(options: VmdkCreateOptions, context: CreateContext) -> tuple[str, int] | None:
    """Name and CID. Raises UsageError if it is no VMDK."""
    name = options.backing_file
    if not name:
        return None
    if any(character in name for character in '"\r\n\0'):
        raise _invalid("backing_file", name)
    node = context.backing_node(needed=True)
    mapping = None if node is None else getattr(node.unfiltered, "mapping", None)
    parent: Descriptor | None = getattr(mapping, "descriptor", None)
    if parent is None:
        raise UsageError("backing_file must be a vmdk image", field="backing_file")
    return name, parent.cid


def _descriptor(
    options: VmdkCreateOptions,
    subformat: str,
    lines: list[ExtentLine],
    parent: tuple[str, int] | None,
) -> Descriptor:
    version = "6" if options.compat6 else options.hwversion
    return descriptors.compose(
        subformat,
        lines,
        parent=parent,
        adapter=options.adapter_type or ADAPTERS[0],
        hardware_version="4" if version in (None, "undefined") else version,
        tools_version="2147483647" if options.toolsversion is None else options.toolsversion,
    )


# -- names -----------------------------------------------------------------------------------------


def base_name(filename: str) -> str:
    return filename.removeprefix("file:").rpartition("/")[2]


def extent_name(name: str, suffix: str) -> str:
    """``disk.vmdk`` -> ``disk-flat.vmdk``."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}{suffix}.{ending}" if dot else f"{name}{suffix}"


# -- extents ---------------------------------------------------------------------------------------


def write_extent(context: CreateContext, line: ExtentLine, *, zeroed: bool) -> None:
    """A file of its own."""
    node = context.create_beside(line.name, line.length if line.type == FLAT else 0)
    if line.type == SPARSE:
        write_sparse(node, line.length, b"", zeroed=zeroed)
    node.flush()


def sparse_header(size: int, *, zeroed: bool) -> SparseHeader:
    """Where everything is in an extent of ``size`` bytes. Raises StorageError (EFBIG)."""
    tables = -(-size // _COVERAGE)
    directory = round_up(tables * ENTRY_SIZE, SECTOR)
    redundant_offset = DESCRIPTOR_OFFSET + DESCRIPTOR_SIZE
    directory_offset = redundant_offset + directory + tables * _TABLE_BYTES
    end = directory_offset + directory + tables * _TABLE_BYTES
    if end // SECTOR > MAX_SECTOR:
        raise StorageError.from_errno(errno.EFBIG)
    return SparseHeader(
        capacity=size,
        directory_offset=directory_offset,
        overhead=round_up(end, GRAIN),
        version=2 if zeroed else 1,
        flags=LINE_ENDINGS_VALID | REDUNDANT | (ZEROED_GRAINS if zeroed else 0),
        redundant_offset=redundant_offset,
    )


def write_sparse(file: Node, size: int, text: bytes, *, zeroed: bool) -> None:
    """All tables are there from the start. ``text``: the descriptor, if it is to be inside."""
    header = sparse_header(size, zeroed=zeroed)
    _check_text(text)
    file.truncate(header.overhead)
    if text:
        file.write(DESCRIPTOR_OFFSET, text)
    for offset in (header.redundant_offset, header.directory_offset):
        file.write(offset, table_directory(offset, header.directory_entries))
    # A file without a header is no image yet.
    file.write(0, header.pack())


def _check_text(text: bytes) -> None:
    if len(text) > DESCRIPTOR_SIZE:
        raise UsageError("The descriptor is too long")


def table_directory(offset: int, tables: int) -> bytes:
    """A directory at ``offset`` whose tables follow right behind its sectors."""
    first = (offset + round_up(tables * ENTRY_SIZE, SECTOR)) // SECTOR
    step = _TABLE_BYTES // SECTOR
    return words(range(first, first + tables * step, step))


def words(numbers: range) -> bytes:
    """As little-endian u32."""
    found = array("I", numbers)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def stream_header(size: int) -> SparseHeader:
    """In front of the first grain there is room for the directory of an image being written."""
    tables = -(-size // _COVERAGE)
    directory = round_up(tables * ENTRY_SIZE, SECTOR)
    return SparseHeader(
        capacity=size,
        directory_offset=-1,
        overhead=round_up(DESCRIPTOR_OFFSET + DESCRIPTOR_SIZE + directory, GRAIN),
        version=3,
        flags=LINE_ENDINGS_VALID | COMPRESSED | MARKERS,
        compression=COMPRESS_DEFLATE,
    )


def _write_stream(file: Node, size: int, text: bytes) -> None:
    """A stream without a single grain."""
    header = stream_header(size)
    _check_text(text)
    directory = bytes(round_up(header.directory_entries * ENTRY_SIZE, SECTOR))
    footer = replace(header, directory_offset=header.overhead + SECTOR)
    file.truncate(header.overhead)
    file.write(DESCRIPTOR_OFFSET, text)
    file.write(header.overhead, trailer(footer, directory))
    file.write(0, header.pack())
