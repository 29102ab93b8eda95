"""qcow2 images in memory, and a second opinion on them: a checker that shares no code with ours
but the layout of the header."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lamina.block.node import Node, NodeOptions
from lamina.block.options import parse
from lamina.engine.disk import Disk
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.create import create
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.options import CreateOptions, Options
from lamina.formats.qcow2.snapshot_layout import parse_snapshots
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile


class _Beside:
    """A ``CreateContext`` as far as a data file is concerned."""

    def __init__(self, file: Node | None) -> None:
        self.file = file

    def create_beside(self, filename: str, size: int, *, from_here: bool = False) -> Node:
        assert self.file is not None
        self.file.truncate(size)
        return self.file


def make(size: int, *, data: Node | None = None, **options: Any) -> bytes:
    """The bytes of a new image; its guest data goes to ``data`` if there is one."""
    file = MemoryFile()
    if data is not None:
        options["data_file"] = "data"
    create(CreateOptions(size=size, **options), file, _Beside(data))  # type: ignore[arg-type]
    return bytes(file.content)


def open_image(
    file: Node,
    *,
    backing: Node | None = None,
    data: Node | None = None,
    node_options: NodeOptions | None = None,
    check: bool = False,
    inspect: bool = False,
    **options: str,
) -> Disk:
    """Open what is in ``file``; ``options`` are runtime options, underscores for dashes."""
    children = {} if data is None else {"data_file": data}
    context = NodesContext(file, backing=backing, node_options=node_options, **children)
    context.check, context.inspect = check, inspect
    given = {key.replace("_", "-"): value for key, value in options.items()}
    parsed, unknown = parse(Options, given)
    assert not unknown
    disk = DRIVER.open(parsed, context)
    assert isinstance(disk, Disk)
    return disk


def read_only(content: bytes) -> MemoryFile:
    return MemoryFile(content, NodeOptions(read_only=True, filename="memory"))


class Verdict(NamedTuple):
    errors: list[str]
    leaks: list[int]
    """Clusters."""


def verify(content: bytes) -> Verdict:
    """Count every reference by hand and compare with the refcounts and COPIED flags."""
    header = Header.parse(content)
    unit = header.cluster_size
    image = content.ljust(-(-len(content) // unit) * unit, b"\0")
    errors: list[str] = []
    references: Counter[int] = Counter()

    def refer(offset: int, length: int, what: str) -> None:
        if offset + length > len(image):
            errors.append(f"{what} at {offset:#x} lies behind the end")
        for cluster in range(offset // unit, -(-(offset + length) // unit)):
            references[cluster] += 1

    def words(offset: int, count: int) -> tuple[int, ...]:
        data = image[offset : offset + count * 8].ljust(count * 8, b"\0")
        return struct.unpack(f">{count}Q", data)

    refer(0, unit, "header")
    if header.crypto is not None:
        refer(header.crypto.offset, header.crypto.length, "LUKS header")
    refer(header.refcount_table_offset, header.refcount_table_clusters * unit, "refcount table")
    blocks = words(header.refcount_table_offset, header.refcount_table_clusters * unit // 8)
    for block in filter(None, blocks):
        if block % unit:
            errors.append(f"refcount block {block:#x} is not aligned")
        refer(block, unit, "refcount block")

    copied: list[tuple[int, bool, str]] = []
    external = bool(header.incompatible_features & 4)
    entry_size = 16 if header.incompatible_features & 16 else 8

    def entries(table: int) -> Iterator[tuple[int, int, int]]:
        """(index, entry, bitmap or 0)"""
        found = words(table, unit // 8)
        if entry_size == 8:
            yield from ((index, entry, 0) for index, entry in enumerate(found))
        else:
            pairs = zip(found[::2], found[1::2], strict=True)
            yield from ((index, *pair) for index, pair in enumerate(pairs))

    def walk_l1(offset: int, size: int, active: bool) -> None:
        if size:
            refer(offset, size * 8, "L1 table")
        for l1_index, l1_entry in enumerate(words(offset, size)):
            table = l1_entry & 0x00FFFFFFFFFFFE00
            if not table:
                continue
            if table % unit:
                errors.append(f"L2 table {table:#x} is not aligned")
            refer(table, unit, "L2 table")
            if active:
                copied.append((table, bool(l1_entry >> 63), f"L1 entry {l1_index}"))
            for index, entry, bitmap in entries(table):
                where = f"L2 entry {l1_index}:{index}"
                place = entry & 0x00FFFFFFFFFFFE00
                named = bool(place or (external and entry >> 63))
                if bitmap & bitmap >> 32 or (bitmap & 0xFFFFFFFF and not named):
                    errors.append(f"{where} has a bad bitmap: {bitmap:#x}")
                if bitmap and entry >> 62 & 1:
                    errors.append(f"{where} is compressed and has a bitmap")
                if external:
                    guest = (l1_index * (unit // entry_size) + index) * unit
                    if entry >> 62 & 1 or (named and (place != guest or not entry >> 63)):
                        errors.append(f"{where} does not suit a data file: {entry:#x}")
                elif entry >> 62 & 1:
                    shift = 62 - (header.cluster_bits - 8)
                    start = entry & (1 << shift) - 1
                    sectors = (entry & (1 << 62) - 1) >> shift
                    end = min((start // 512 + sectors + 1) * 512, len(image))
                    refer(start, end - start, where)
                    if entry >> 63:
                        errors.append(f"{where} is compressed and COPIED")
                elif place:
                    if place % unit or (entry & 1 and header.version < 3):
                        errors.append(f"{where} is bad: {entry:#x}")
                    refer(place, unit, where)
                    if active:
                        copied.append((place, bool(entry >> 63), where))

    walk_l1(header.l1_table_offset, header.l1_size, True)
    if header.nb_snapshots:
        snapshots = parse_snapshots(content[header.snapshots_offset :], header.nb_snapshots)
        length = sum(snapshot.entry_length for snapshot in snapshots)
        refer(header.snapshots_offset, length, "snapshot table")
        for snapshot in snapshots:
            walk_l1(snapshot.l1_table_offset, snapshot.l1_size, False)

    if header.bitmaps is not None and header.autoclear_features & 1:
        start, length = header.bitmaps.directory_offset, header.bitmaps.directory_size
        refer(start, length, "bitmap directory")
        end = start + length
        while start < end:
            fields = struct.unpack(">QIIBBHI", image[start : start + 24])
            table, entries, names = fields[0], fields[1], fields[5]
            refer(table, entries * 8, "bitmap table")
            for entry in words(table, entries):
                if entry > 1:
                    refer(entry, unit, "bitmap data")
                    if entry % unit:
                        errors.append(f"bitmap table entry {entry:#x} is not aligned")
            start += -(-(24 + names) // 8) * 8

    width = header.refcount_bits
    per_block = unit * 8 // width

    def count(cluster: int) -> int:
        index, place = divmod(cluster, per_block)
        if index >= len(blocks) or not blocks[index]:
            return 0
        block = image[blocks[index] : blocks[index] + unit]
        if width >= 8:
            size = width // 8
            return int.from_bytes(block[place * size : (place + 1) * size], "big")
        return block[place * width // 8] >> (place * width % 8) & (1 << width) - 1

    leaks = []
    last = max([*references, len(image) // unit - 1])
    for cluster in range(last + 1):
        found, wanted = count(cluster), references[cluster]
        if found < wanted:
            errors.append(f"cluster {cluster} refcount={found} reference={wanted}")
        elif found > wanted:
            leaks.append(cluster)
    for place, flag, where in copied:
        cluster = place // unit
        # A leaked reference makes a flag too careful, which harms nobody.
        fits = references[cluster] == 1 if flag else count(cluster) != 1
        if not fits:
            errors.append(f"{where} COPIED={flag} refcount={count(cluster)}")
    return Verdict(errors, leaks)
