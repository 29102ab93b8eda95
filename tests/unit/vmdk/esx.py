"""Images as ESX writes them, which QEMU and we only read: made from their layouts."""

from __future__ import annotations

import struct

from lamina.formats.vmdk import cowd, sesparse

Grains = dict[int, bytes]
"""Number of a grain -> its bytes."""


def cowd_image(size: int, grains: Grains, *, grain: int = 512) -> bytes:
    """Tables where they are needed, in the order of the grains given."""
    entries = -(-size // (grain * cowd.TABLE_ENTRIES))
    header = cowd.CowdHeader(size, grain, cowd.HEADER_SIZE, entries)
    directory = [0] * entries
    end = cowd.HEADER_SIZE + -(-4 * entries // 512) * 512
    tables: dict[int, list[int]] = {}
    parts = []
    for number in sorted({number // cowd.TABLE_ENTRIES for number in grains}):
        directory[number] = end // 512
        tables[number] = [0] * cowd.TABLE_ENTRIES
        end += 4 * cowd.TABLE_ENTRIES
    for number, data in grains.items():
        table, index = divmod(number, cowd.TABLE_ENTRIES)
        tables[table][index] = end // 512
        parts.append(data)
        end += len(data)
    image = header.pack() + struct.pack(f"<{entries}I", *directory)
    image = image.ljust(-(-len(image) // 512) * 512, b"\0")
    for table in tables.values():
        image += struct.pack(f"<{cowd.TABLE_ENTRIES}I", *table)
    return image + b"".join(parts)


def sesparse_image(
    size: int, grains: Grains, *, unmapped: tuple[int, ...] = (), zero: tuple[int, ...] = ()
) -> bytes:
    per_table = sesparse.TABLE_ENTRIES
    count = -(-size // (per_table * sesparse.GRAIN))
    used = sorted({number // per_table for number in (*grains, *unmapped, *zero)})
    area = sesparse.Area
    directory = area(4096, -(-8 * count // 512) * 512)
    tables = area(directory.offset + directory.length, len(used) * per_table * 8)
    start = -(-(tables.offset + tables.length) // 4096) * 4096
    header = sesparse.SeSparseHeader(
        size, area(512, 512), directory, tables, area(start, len(grains) * sesparse.GRAIN)
    )
    entries = [[0] * per_table for _ in used]

    def name(number: int, entry: int) -> None:
        table, index = divmod(number, per_table)
        entries[used.index(table)][index] = entry

    # The latest first, so that places are in another order than addresses.
    for place, number in enumerate(reversed(list(grains))):
        name(number, sesparse.grain_entry(place))
    for number in unmapped:
        name(number, 1 << 60)
    for number in zero:
        name(number, 2 << 60)
    image = bytearray(start)
    image[:512] = header.pack()
    image[512:1024] = sesparse.pack_volatile()
    for place, table in enumerate(used):
        struct.pack_into("<Q", image, directory.offset + 8 * table, 0x1000_0000 << 32 | place)
    for place, table in enumerate(entries):
        offset = tables.offset + place * per_table * 8
        struct.pack_into(f"<{per_table}Q", image, offset, *table)
    return bytes(image) + b"".join(grains[number] for number in reversed(list(grains)))
