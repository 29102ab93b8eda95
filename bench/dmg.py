"""A DMG out of raw data: ``python -m bench.dmg data.raw data.dmg``.

Chunks of 256 KiB, zlib-encoded, as most images have them; those of zeroes are zero-fill chunks.
There is one block table, and there are no checksums.
"""

from __future__ import annotations

import base64
import struct
import sys
import zlib

SECTOR = 512
CHUNK = 512
"""Sectors."""
ZERO, ZLIB, END = 0, 0x80000005, 0xFFFFFFFF


def make(source: str, target: str) -> None:
    rows: list[tuple[int, int, int, int, int, int]] = []
    sector = place = 0
    with open(source, "rb") as data, open(target, "wb") as image:
        while piece := data.read(CHUNK * SECTOR):
            count = -(-len(piece) // SECTOR)
            packed = zlib.compress(piece.ljust(count * SECTOR, b"\0")) if any(piece) else b""
            rows.append((ZLIB if packed else ZERO, 0, sector, count, place, len(packed)))
            image.write(packed)
            sector, place = sector + count, place + len(packed)
        rows.append((END, 0, sector, 0, place, 0))
        table = struct.pack(">4sIQQQII24x136xI", b"mish", 1, 0, sector, 0, CHUNK, 0, len(rows))
        table += b"".join(struct.pack(">IIQQQQ", *row) for row in rows)
        plist = (
            b'<plist version="1.0"><dict><key>resource-fork</key><dict><key>blkx</key><array>'
            b"<dict><key>Data</key><data>" + base64.b64encode(table) + b"</data></dict></array>"
            b"</dict></dict></plist>"
        )
        image.write(plist)
        trailer = struct.pack(">4sIIIQQQQQII16x136x", b"koly", 4, 512, 1, 0, 0, place, 0, 0, 1, 1)
        trailer += struct.pack(">QQ120x136xIQ12x", place, len(plist), 1, sector)
        image.write(trailer)


if __name__ == "__main__":
    make(*sys.argv[1:3])
