"""Entries of a refcount block, in all widths ("Host cluster management").

A block is kept as it is on disk. Entries of 8 bits and more are big-endian numbers; smaller ones
are packed into bytes, the first entry in the lowest bits.
"""

from __future__ import annotations

from array import array

MAX_COUNT = (1 << 63) - 1
"""What QEMU takes as the highest 64-bit count."""
_PIECE = 4096
"""Bytes that are searched at a time."""


class Width:
    """Reads, changes and searches blocks whose entries are ``1 << order`` bits wide."""

    def __init__(self, order: int) -> None:
        self.bits = 1 << order
        self.maximum = min((1 << self.bits) - 1, MAX_COUNT)
        self.bytes = self.bits // 8
        """Per entry; 0 for packed ones."""
        if self.bits < 8:
            self._per_byte = 8 // self.bits
            self._mask = (1 << self.bits) - 1
            self._full = bytes(byte for byte in range(256) if not self._has_zero(byte))

    def _has_zero(self, byte: int) -> bool:
        return any(not byte >> shift & self._mask for shift in range(0, 8, self.bits))

    def entries(self, block_bytes: int) -> int:
        """Entries of a block of this size."""
        return block_bytes * 8 // self.bits

    def get(self, block: bytearray, index: int) -> int:
        size = self.bytes
        if size:
            return int.from_bytes(block[index * size : (index + 1) * size], "big")
        byte, place = divmod(index, self._per_byte)
        return block[byte] >> (place * self.bits) & self._mask

    def fill(self, block: bytearray, first: int, count: int, value: int) -> None:
        """Set ``count`` entries to ``value``."""
        size = self.bytes
        if size:
            block[first * size : (first + count) * size] = value.to_bytes(size, "big") * count
            return
        per_byte = self._per_byte
        end = first + count
        while first < end and first % per_byte:
            self._set(block, first, value)
            first += 1
        whole = (end - first) // per_byte
        if whole > 0:
            pattern = sum(value << shift for shift in range(0, 8, self.bits))
            start = first // per_byte
            block[start : start + whole] = bytes([pattern]) * whole
            first += whole * per_byte
        for index in range(first, end):
            self._set(block, index, value)

    def _set(self, block: bytearray, index: int, value: int) -> None:
        byte, place = divmod(index, self._per_byte)
        shift = place * self.bits
        block[byte] = block[byte] & ~(self._mask << shift) | value << shift

    def changed(self, first: int, count: int) -> tuple[int, int]:
        """(start, length) in bytes of these entries."""
        start = first * self.bits // 8
        return start, -(-(first + count) * self.bits // 8) - start

    def runs(self, block: bytearray, first: int, count: int) -> list[tuple[int, int, int]]:
        """(first, count, value) of the runs of equal entries in this part of the block."""
        end = first + count
        value = self.get(block, first)
        if self._is_filled(block, first, count, value):
            return [(first, count, value)]
        runs = []
        start = first
        for index in range(first + 1, end):
            current = self.get(block, index)
            if current != value:
                runs.append((start, index - start, value))
                start, value = index, current
        runs.append((start, end - start, value))
        return runs

    def _is_filled(self, block: bytearray, first: int, count: int, value: int) -> bool:
        size = self.bytes
        if size:
            return block[first * size : (first + count) * size] == (
                value.to_bytes(size, "big") * count
            )
        return count == 1

    def next_free(self, block: bytearray, start: int) -> int:
        """Index of the first zero entry from ``start`` on; the number of entries if none."""
        total = self.entries(len(block))
        size = self.bytes
        if size:
            zero = bytes(size)
            position = block.find(zero, start * size)
            while position >= 0:
                if position % size == 0:
                    return position // size
                # The zeroes span two entries; the second one may be free as well.
                position = block.find(zero, position - position % size + size)
            return total
        while start < total:
            if not self.get(block, start):
                return start
            start += 1
            if start % self._per_byte == 0:
                start = _first_other(block, start // self._per_byte, len(block), self._full)
                start *= self._per_byte
        return total

    def next_used(self, block: bytearray, start: int, end: int) -> int:
        """Index of the first nonzero entry from ``start`` on; ``end`` if there is none before."""
        end = min(end, self.entries(len(block)))
        size = self.bytes
        if size:
            return _first_other(block, start * size, end * size, b"\0") // size
        while start < end:
            if self.get(block, start):
                return start
            start += 1
            if start % self._per_byte == 0:
                start = _first_other(block, start // self._per_byte, len(block), b"\0")
                start *= self._per_byte
        return end

    def count_used(self, block: bytearray) -> int:
        """Entries that are not zero."""
        if self.bytes:
            entries = array("BHIQ"[self.bytes.bit_length() - 1], bytes(block))
            return len(entries) - entries.count(0)
        return sum(block.count(byte) * self._used_entries(byte) for byte in set(block))

    def _used_entries(self, byte: int) -> int:
        mask = (1 << self.bits) - 1
        return sum(bool(byte >> shift & mask) for shift in range(0, 8, self.bits))

    def last_used(self, block: bytearray) -> int:
        """Index of the last nonzero entry; -1 if there is none."""
        used = len(block.rstrip(b"\0"))
        if not used:
            return -1
        if self.bytes:
            return (used - 1) // self.bytes
        top = block[used - 1].bit_length() - 1
        return (used - 1) * self._per_byte + top // self.bits


def _first_other(block: bytearray, start: int, end: int, known: bytes) -> int:
    """Where the first byte from ``start`` on is that is none of ``known``; ``end`` if all are."""
    while start < end:
        piece = block[start : min(start + _PIECE, end)]
        rest = len(piece.lstrip(known))
        start += len(piece) - rest
        if rest:
            return start
    return end
