"""Where the block tables of an image are: in its property list, or in a binary resource fork."""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterator

from lamina.errors import ImageCorrupt, LaminaError
from lamina.formats.dmg.layout import BlockTable, Trailer, parse_table
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.block.xmltext import Element

MAX_RESOURCES = 64 << 20
"""Bytes of either. Room for the tables of a million chunks."""
MAX_TABLES = 10_000
_U32 = struct.Struct(">I")
_FORK = struct.Struct(">IIII")


def read_tables(file: Node, trailer: Trailer, end: int) -> list[BlockTable]:
    """In the order of the image. ``end``: where the trailer is. Raises ImageCorrupt."""
    if trailer.resource_length:
        name, offset, length = "resource fork", trailer.resource_offset, trailer.resource_length
    elif trailer.plist_length:
        name, offset, length = "property list", trailer.plist_offset, trailer.plist_length
    else:
        raise ImageCorrupt(
            "The image has no block tables",
            format="dmg",
            structure="trailer",
            field="property list length",
        )
    if length > MAX_RESOURCES:
        raise ImageCorrupt(
            f"The {name} is larger than {MAX_RESOURCES} bytes",
            format="dmg",
            structure="trailer",
            field=f"{name} length",
        )
    tables: list[BlockTable] = []
    chunks = 0
    try:
        data = file.read(offset, length)
        fork = bool(trailer.resource_length)
        for resource in in_resource_fork(data) if fork else in_property_list(data):
            table = parse_table(resource, chunks, trailer.data_offset, end)
            if table is not None:
                tables.append(table)
                chunks += len(table.chunks.type)
            if len(tables) > MAX_TABLES:
                raise ImageCorrupt(f"There are more than {MAX_TABLES} block tables")
    except LaminaError as error:
        error.format = "dmg"
        error.structure = error.structure or name
        raise
    return tables


def in_property_list(text: bytes) -> Iterator[bytes]:
    """The data of all ``blkx`` resources. Raises ImageCorrupt."""
    from lamina.block.xmltext import parse_xml

    root = parse_xml(text).find("dict")
    fork = _value(root, "resource-fork")
    blocks = _value(fork, "blkx")
    if blocks is None or blocks.name != "array":
        raise ImageCorrupt("The property list names no blkx resources", structure="property list")
    for entry in blocks.all("dict"):
        data = _value(entry, "Data")
        if data is None:
            continue
        try:
            yield binascii.a2b_base64(data.text)
        except ValueError as error:
            raise ImageCorrupt(f"A blkx resource is not base64: {error}") from None


def _value(dictionary: Element | None, key: str) -> Element | None:
    """What stands behind a key of a property list's dictionary."""
    if dictionary is None:
        return None
    found = False
    for child in dictionary.children:
        if found:
            return child
        found = child.name == "key" and child.text == key
    return None


def in_resource_fork(fork: bytes) -> Iterator[bytes]:
    """All resources, whatever they are. Raises ImageCorrupt.

    The fork begins with the offsets of its data and its map, and their lengths; the data is all
    resources, each with its length in front (Inside Macintosh, "Resource File Format").
    """
    if len(fork) < _FORK.size:
        raise ImageCorrupt("The resource fork is too short")
    at, _, length, _ = _FORK.unpack_from(fork)
    end = at + length
    if end > len(fork):
        raise ImageCorrupt("The data of the resource fork ends behind its end")
    while at + 4 <= end:
        length = _U32.unpack_from(fork, at)[0]
        at += 4
        if at + length > end:
            raise ImageCorrupt("A resource ends behind the data of the resource fork")
        yield fork[at : at + length]
        at += length
