"""A set of small numbers, as bits: sparse, and quick with runs and with whole sets.

Bits are kept in chunks of 16 KiB. A chunk of which no bit is set need not exist, and all chunks
of which every bit is set are one: a set over terabytes costs what was touched of it. The bytes are
those of a qcow2 bitmap: bit ``n`` is bit ``n % 8``, counted from the lowest, of byte ``n // 8``.

Not thread-safe: whoever shares one locks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CHUNK_BYTES = 1 << 14
CHUNK_SHIFT = 17
CHUNK_BITS = 1 << CHUNK_SHIFT
_LOW = CHUNK_BITS - 1

_FULL = b"\xff" * CHUNK_BYTES
_EMPTY = bytes(CHUNK_BYTES)
_OTHER_THAN_ZERO = re.compile(rb"[^\0]+")

Chunk = bytes | bytearray
"""A ``bytearray``, or ``_FULL`` itself, which nobody may change."""


class Bitset:
    def __init__(self) -> None:
        self._chunks: dict[int, Chunk] = {}
        self.changed: set[int] = set()
        """Numbers of the chunks that are not what they were when this was emptied last."""

    @property
    def chunks(self) -> list[int]:
        """Numbers of the chunks that exist: in all others no bit is set."""
        return list(self._chunks)

    # -- single bits and runs --------------------------------------------------------------------

    def add(self, bit: int) -> None:
        number, at = bit >> CHUNK_SHIFT, bit & _LOW
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._chunks[number] = bytearray(CHUNK_BYTES)
        elif chunk[at >> 3] >> (at & 7) & 1:
            return
        assert type(chunk) is bytearray
        chunk[at >> 3] |= 1 << (at & 7)
        self.changed.add(number)

    def __contains__(self, bit: int) -> bool:
        chunk = self._chunks.get(bit >> CHUNK_SHIFT)
        at = bit & _LOW
        return chunk is not None and bool(chunk[at >> 3] >> (at & 7) & 1)

    def add_run(self, first: int, end: int) -> None:
        """Set the bits from ``first`` up to ``end``, which is not one of them."""
        for number, low, high in _parts(first, end):
            chunk = self._chunks.get(number)
            if chunk is _FULL:
                continue
            if high - low == CHUNK_BITS:
                self._chunks[number] = _FULL
                self.changed.add(number)
                continue
            if chunk is None:
                chunk = self._chunks[number] = bytearray(CHUNK_BYTES)
            assert type(chunk) is bytearray
            touched = slice(low >> 3, (high + 7) >> 3)
            before = chunk[touched]
            _set(chunk, low, high)
            if chunk[touched] != before:
                self.changed.add(number)

    def discard_run(self, first: int, end: int) -> None:
        """Clear the bits from ``first`` up to ``end``, which is not one of them."""
        for number in self._numbers(first, end):
            start = number << CHUNK_SHIFT
            low, high = max(first - start, 0), min(end - start, CHUNK_BITS)
            chunk = self._chunks[number]
            self.changed.add(number)
            if high - low == CHUNK_BITS:
                del self._chunks[number]
                continue
            if chunk is _FULL:
                chunk = self._chunks[number] = bytearray(_FULL)
            assert type(chunk) is bytearray
            _clear(chunk, low, high)

    # -- whole sets ------------------------------------------------------------------------------

    def clear(self) -> None:
        self.changed.update(self._chunks)
        self._chunks.clear()

    def update(self, other: Bitset) -> None:
        """Set every bit that is set in ``other``."""
        for number, theirs in other._chunks.items():
            mine = self._chunks.get(number)
            if mine is _FULL:
                continue
            if theirs is _FULL:
                self._chunks[number] = _FULL
            elif mine is None:
                self._chunks[number] = bytearray(theirs)
            else:
                before = int.from_bytes(mine, "little")
                after = before | int.from_bytes(theirs, "little")
                if after == before:
                    continue
                self._chunks[number] = bytearray(after.to_bytes(CHUNK_BYTES, "little"))
            self.changed.add(number)

    def __len__(self) -> int:
        """How many bits are set."""
        return sum(
            CHUNK_BITS if chunk is _FULL else int.from_bytes(chunk, "little").bit_count()
            for chunk in self._chunks.values()
        )

    # -- as bytes --------------------------------------------------------------------------------

    def read(self, position: int, length: int) -> bytes:
        """``length`` bytes from byte ``position`` on."""
        parts = []
        for number, low, high in _parts(position << 3, (position + length) << 3):
            chunk = self._chunks.get(number, _EMPTY)
            parts.append(bytes(memoryview(chunk)[low >> 3 : high >> 3]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def load(self, position: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes in place of those from byte ``position`` on; that is not a change."""
        view = memoryview(data)
        at = 0
        for number, low, high in _parts(position << 3, (position + len(view)) << 3):
            piece = view[at : at + ((high - low) >> 3)]
            at += len(piece)
            chunk = self._chunks.get(number)
            if chunk is None:
                if piece == _EMPTY[: len(piece)]:
                    continue
                if piece == _FULL:
                    self._chunks[number] = _FULL
                    continue
                chunk = self._chunks[number] = bytearray(CHUNK_BYTES)
            elif chunk is _FULL:
                chunk = self._chunks[number] = bytearray(_FULL)
            assert type(chunk) is bytearray
            chunk[low >> 3 : high >> 3] = piece

    def load_ones(self, position: int, length: int) -> None:
        """The same with ``length`` bytes whose bits are all set."""
        for number, low, high in _parts(position << 3, (position + length) << 3):
            if high - low == CHUNK_BITS:
                self._chunks[number] = _FULL
            else:
                self.load((number * CHUNK_BYTES) + (low >> 3), _FULL[: (high - low) >> 3])

    # -- looking through it ----------------------------------------------------------------------

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the runs of bits that are set, in order, cut to what is asked for.

        The set may change between two of them.
        """
        last: tuple[int, int] | None = None
        for number in self._numbers(first, end):
            chunk = self._chunks.get(number)
            if chunk is None:
                continue
            start = number << CHUNK_SHIFT
            if chunk is _FULL:
                pieces = [(start, start + CHUNK_BITS)]
            else:
                edges = _edges(chunk, start)
                pieces = list(zip(edges[::2], edges[1::2], strict=True))
            if start < first or start + CHUNK_BITS > end:
                cut = ((max(low, first), min(high, end)) for low, high in pieces)
                pieces = [(low, high) for low, high in cut if low < high]
            if not pieces:
                continue
            if last is not None:
                if pieces[0][0] == last[1]:
                    pieces[0] = (last[0], pieces[0][1])
                else:
                    yield last
            last = pieces.pop()
            yield from pieces
        if last is not None:
            yield last

    def _numbers(self, first: int, end: int) -> list[int]:
        """Of the chunks that exist in this run of bits."""
        numbers = range(first >> CHUNK_SHIFT, -(-end >> CHUNK_SHIFT))
        if len(self._chunks) < len(numbers):
            return sorted(number for number in self._chunks if number in numbers)
        return [number for number in numbers if number in self._chunks]


def _parts(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """A run of bits as (number of the chunk, first bit in it, end in it)."""
    while first < end:
        number, low = first >> CHUNK_SHIFT, first & _LOW
        high = min(end - (number << CHUNK_SHIFT), CHUNK_BITS)
        yield number, low, high
        first = (number << CHUNK_SHIFT) + high


def _set(chunk: bytearray, low: int, high: int) -> None:
    first, last = low >> 3, (high - 1) >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - (high - 1 & 7))
    if first == last:
        chunk[first] |= head & tail
        return
    chunk[first] |= head
    chunk[first + 1 : last] = _FULL[: last - first - 1]
    chunk[last] |= tail


def _clear(chunk: bytearray, low: int, high: int) -> None:
    first, last = low >> 3, (high - 1) >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - (high - 1 & 7))
    if first == last:
        chunk[first] &= ~(head & tail)
        return
    chunk[first] &= ~head
    chunk[first + 1 : last] = bytes(last - first - 1)
    chunk[last] &= ~tail


_BITS = [tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256)]
"""Which bits are set in a byte."""


def _edges(chunk: Chunk, start: int) -> list[int]:
    """Where runs of set bits begin and end, in turn; ``start`` is the number of the first bit."""
    bits = int.from_bytes(chunk, "little")
    flips = (bits ^ bits << 1).to_bytes(CHUNK_BYTES + 1, "little")
    edges: list[int] = []
    for match in _OTHER_THAN_ZERO.finditer(flips):
        at = start + (match.start() << 3)
        for byte in match.group():
            edges += [at + bit for bit in _BITS[byte]]
            at += 8
    return edges
