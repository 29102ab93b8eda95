"""The checksums of an image: of its data fork, of every block table, and of those checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from zlib import crc32

from lamina.block.driver import CheckResult
from lamina.errors import LaminaError
from lamina.formats.dmg.layout import (
    IGNORE,
    RAW,
    TRAILER_SIZE,
    UNREADABLE,
    ZERO,
    BlockTable,
    Checksum,
)
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.dmg.mapping import DmgMapping

_STEP = 4 << 20
"""Bytes read at a time."""


def check(mapping: DmgMapping, report: Callable[[str], None]) -> CheckResult:
    """Nothing can be repaired: there is nothing to repair it from."""
    return _Check(mapping, report).run()


class _Check:
    def __init__(self, mapping: DmgMapping, report: Callable[[str], None]) -> None:
        self.node = mapping.disk
        self.mapping = mapping
        self.report = report
        self.result = CheckResult(image_end_offset=mapping.end + TRAILER_SIZE)

    def run(self) -> CheckResult:
        types = self.mapping.chunks.type
        self.result.total_clusters = len(types)
        unreadable = types.count(UNREADABLE)
        if unreadable:
            self.wrong(f"{unreadable} chunks lie outside of the image or are of unknown types")
        trailer = self.mapping.trailer
        self.compare("the data fork", trailer.data_checksum, self.of_data_fork)
        for number, table in enumerate(self.mapping.tables):
            self.compare(f"block table {number}", table.checksum, partial(self.of_table, table))
        self.compare("the image", trailer.master_checksum, self.of_checksums)
        return self.result

    def wrong(self, text: str) -> None:
        self.report(f"ERROR {text}")
        self.result.corruptions += 1

    def compare(
        self, what: str, expected: Checksum, compute: Callable[[], set[int]]
    ) -> None:
        """``compute`` returns the values that are right."""
        if expected.type == 0:
            return
        if expected.crc32 is None:
            self.report(f"The checksum of {what} is of type {expected.type}: not checked")
            return
        try:
            found = compute()
        except LaminaError as error:
            self.wrong(f"{what}: cannot be read: {error}")
            return
        if expected.crc32 not in found:
            self.wrong(f"{what}: checksum is {min(found):#010x}, expected {expected.crc32:#010x}")

    def of_data_fork(self) -> set[int]:
        trailer = self.mapping.trailer
        end = trailer.data_offset + trailer.data_length
        if end > self.mapping.end:
            return set()
        sum = 0
        for part in _parts(self.mapping.file, trailer.data_offset, end):
            sum = crc32(part, sum)
        return {sum}

    def of_table(self, table: BlockTable) -> set[int]:
        """Apple leaves out what is to be ignored; other makers sum it up as the zeroes it reads as.
        """
        strict = lenient = 0
        for kind, start, end in _runs(table):
            if kind in (ZERO, IGNORE):
                if kind == ZERO:
                    strict = crc32_with_zeroes(strict, end - start)
                lenient = crc32_with_zeroes(lenient, end - start)
                continue
            same = strict == lenient
            for part in _parts(self.node, start, end):
                strict = crc32(part, strict)
                lenient = strict if same else crc32(part, lenient)
        return {strict, lenient}

    def of_checksums(self) -> set[int]:
        """Over the values, one behind the other."""
        values = (table.checksum for table in self.mapping.tables)
        return {crc32(b"".join(one.value[: one.bits // 8] for one in values))}


def _parts(node: Node, start: int, end: int) -> Iterator[bytearray]:
    for at in range(start, end, _STEP):
        part = bytearray(min(_STEP, end - at))
        node.readv([(at, memoryview(part))])
        yield part


def _runs(table: BlockTable) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of the disk: what is stored, or what is zero or ignored, in one piece."""
    kinds, starts, lengths, _, _ = table.chunks
    last = first = stop = 0
    for kind, start, length in zip(kinds, starts, lengths, strict=True):
        kind = kind if kind in (ZERO, IGNORE) else RAW
        if stop > first and (kind, start) != (last, stop):
            yield last, first, stop
            first = start
        elif stop == first:
            first = start
        last, stop = kind, start + length
    if stop > first:
        yield last, first, stop


def crc32_with_zeroes(sum: int, count: int) -> int:
    """``crc32(bytes(count), sum)``, in no time: the register times x to the power of 8 * count."""
    register, power = sum ^ 0xFFFFFFFF, 1 << 23
    while count:
        if count & 1:
            register = _times(register, power)
        power = _times(power, power)
        count >>= 1
    return register ^ 0xFFFFFFFF


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32; the highest bit is the coefficient of
    x to the power of 0."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ 0xEDB88320 if b & 1 else b >> 1
    return product
