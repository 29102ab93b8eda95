"""CRC-32C (Castagnoli), the checksum of VHDX and iSCSI."""

from __future__ import annotations


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Of the whole of ``data``, with the usual initial value and final inversion."""
    from google_crc32c import value

    return int(value(bytes(data)))
