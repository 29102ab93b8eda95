"""Reading: from guest addresses to bytes in the caller's buffers.

``plan`` asks the mapping about a whole batch at once, under the disk's lock; ``fetch`` then moves
the bytes without it: plain runs of all requests as one batch per node, straight into the caller's
buffers; encoded units decoded on several cores; what is not here from the backing file.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.extents import Kind
from lamina.buffers import new_buffer
from lamina.engine.workers import run_all
from lamina.errors import ImageCorrupt, LaminaError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.extents import Cipher, Extent
    from lamina.block.node import Node, ReadRequest
    from lamina.codecs import Decoder
    from lamina.engine.disk import Disk

ZEROES = memoryview(bytes(1 << 16))

DECODE_AHEAD = 16 << 20
"""Bytes of decoded units that one read holds at a time."""
DECODE_TOGETHER = 1 << 20
"""Bytes of decoded units from which on several cores share them. Whoever reads less at a time and
wants more cores reads on several threads."""
MERGE_GAP = 4096
"""Encoded units closer than this are fetched with one read."""
MERGE_LIMIT = 2 << 20
"""Bytes of encoded units fetched with one read."""


def fill_zeroes(buffer: memoryview) -> None:
    length = len(buffer)
    if length <= len(ZEROES):
        buffer[:] = ZEROES[:length]
        return
    step = len(ZEROES)
    for start in range(0, length, step):
        part = buffer[start : start + step]
        part[:] = ZEROES[: len(part)]


class Plan:
    """Where the bytes of a batch come from, once resolved."""

    __slots__ = ("below", "encoded", "encrypted", "plain", "zeroes")

    def __init__(self) -> None:
        self.plain: dict[Node, list[ReadRequest]] = {}
        """Reads per node."""
        self.zeroes: list[memoryview] = []
        self.below: list[ReadRequest] = []
        self.encoded: list[tuple[Extent, memoryview]] = []
        self.encrypted: list[tuple[Cipher, memoryview, int]] = []
        """Buffers to be decrypted after they have been read, and their first sectors."""


class Reader:
    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer. The caller holds a pin."""
        with self.disk.lock:
            plan = self.plan(requests)
        self.fetch(plan)

    def plan(self, requests: Sequence[ReadRequest]) -> Plan:
        """Resolve a batch. Under the disk's lock."""
        resolve = self.disk.mapping.resolve
        plan = Plan()
        for offset, buffer in requests:
            for extent in resolve(offset, len(buffer)):
                start = extent.guest_offset - offset
                part = buffer[start : start + extent.length]
                kind = extent.kind
                if kind == Kind.DATA:
                    node = extent.node
                    assert node is not None
                    plan.plain.setdefault(node, []).append((extent.host_offset, part))
                    if extent.cipher is not None:
                        plan.encrypted.append((extent.cipher, part, extent.first_sector))
                elif kind == Kind.ZERO:
                    plan.zeroes.append(part)
                elif kind == Kind.BELOW:
                    plan.below.append((extent.guest_offset, part))
                elif kind == Kind.ENCODED:
                    plan.encoded.append((extent, part))
                else:
                    assert extent.data is not None
                    part[:] = extent.data
        return plan

    def fetch(self, plan: Plan) -> None:
        """Move the bytes. Without the lock; the caller's pin keeps the places valid."""
        file = self.disk.file
        for part in plan.zeroes:
            fill_zeroes(part)
        for node, reads in plan.plain.items():
            file.event("read_aio")
            node.readv(reads)
        for cipher, part, sector in plan.encrypted:
            cipher.decrypt(part, sector)
        if plan.below:
            self._fetch_below(plan.below)
        if plan.encoded:
            self._fetch_encoded(plan.encoded)

    # -- from below ------------------------------------------------------------------------------

    def inside_backing(self) -> int:
        """Guest offset from which on there is nothing below."""
        disk = self.disk
        backing = disk.backing
        # VM state lies behind the disk: whatever a longer backing file has there is not ours.
        return 0 if backing is None else min(backing.size, disk.mapping.size)

    def _fetch_below(self, requests: list[ReadRequest]) -> None:
        end = self.inside_backing()
        reads: list[ReadRequest] = []
        for offset, buffer in requests:
            inside = min(max(end - offset, 0), len(buffer))
            if inside:
                reads.append((offset, buffer[:inside]))
            if inside < len(buffer):
                fill_zeroes(buffer[inside:])
        backing = self.disk.backing
        if reads and backing is not None:
            self.disk.file.event("read_backing_aio")
            backing.readv(reads)

    # -- encoded units ---------------------------------------------------------------------------

    def _fetch_encoded(self, wanted: list[tuple[Extent, memoryview]]) -> None:
        units: dict[tuple[int, int], Unit] = {}
        cache = self.disk.units
        for extent, part in wanted:
            decoded = cache.get(extent)
            if decoded is not None:
                _copy(decoded, extent, part)
                continue
            key = (id(extent.node), extent.unit_offset)
            units.setdefault(key, Unit(extent)).parts.append((extent, part))
        batch: list[Unit] = []
        size = 0
        for unit in sorted(units.values(), key=_place):
            batch.append(unit)
            size += unit.extent.unit_length
            if size >= DECODE_AHEAD:
                self._decode_once(batch)
                batch, size = [], 0
        if batch:
            self._decode_once(batch)

    def _decode_once(self, units: list[Unit]) -> None:
        """Decode units; those that another thread is decoding parts of are taken from it."""
        cache = self.disk.units
        mine: list[Unit] = []
        begun: list[Extent] = []
        others: list[Unit] = []
        for unit in units:
            if unit.wanted == unit.extent.unit_length:
                mine.append(unit)
            elif cache.begin(unit.extent):
                mine.append(unit)
                begun.append(unit.extent)
            else:
                others.append(unit)
        try:
            if mine:
                self._decode(mine)
        finally:
            for extent in begun:
                cache.end(extent)
        for unit in others:
            cache.wait(unit.extent)
            decoded = cache.get(unit.extent)
            if decoded is None:
                self._decode([unit])
            else:
                for extent, part in unit.parts:
                    _copy(decoded, extent, part)

    def _decode(self, units: list[Unit]) -> None:
        """Fetch and decode units, which are in host order."""
        self.disk.file.event("read_compressed")
        run: list[Unit] = []
        for unit in units:
            if run and not _joins(run, unit):
                _fetch_run(run)
                run = []
            run.append(unit)
        _fetch_run(run)
        size = sum(unit.extent.unit_length for unit in units)
        run_all(self._decode_unit, units, threads=1 if size < DECODE_TOGETHER else 0)

    def _decode_unit(self, unit: Unit) -> None:
        extent = unit.extent
        try:
            decoded = _decoder(extent.codec)(unit.encoded, extent.unit_length)
        except LaminaError as error:
            error.path = error.path or self.disk.filename
            error.offset = extent.host_offset
            raise
        for part_extent, part in unit.parts:
            _copy(decoded, part_extent, part)
        # A unit that was read as a whole will hardly be asked for again.
        if unit.wanted < extent.unit_length:
            self.disk.units.add(extent, decoded)


class Unit:
    """An encoded unit on its way, and who wants which parts of it."""

    __slots__ = ("encoded", "extent", "parts")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.parts: list[tuple[Extent, memoryview]] = []
        self.encoded = memoryview(b"")

    @property
    def wanted(self) -> int:
        """Bytes of it that somebody wants."""
        return sum(len(part) for _, part in self.parts)


def _decoder(codec: str) -> Decoder:
    # Not on the way to opening an image.
    from lamina.codecs import decoder

    return decoder(codec)


def _place(unit: Unit) -> tuple[int, int]:
    return id(unit.extent.node), unit.extent.host_offset


def _joins(run: list[Unit], unit: Unit) -> bool:
    first, last, extent = run[0].extent, run[-1].extent, unit.extent
    return (
        extent.node is first.node
        and extent.host_offset <= last.host_offset + last.stored_length + MERGE_GAP
        and extent.host_offset + extent.stored_length - first.host_offset <= MERGE_LIMIT
    )


def _fetch_run(run: list[Unit]) -> None:
    """Read the encoded bytes of neighbours at once; what lies behind the file's end is missing."""
    node = run[0].extent.node
    assert node is not None
    start = run[0].extent.host_offset
    end = max(unit.extent.host_offset + unit.extent.stored_length for unit in run)
    end = min(end, node.size)
    if end <= start:
        raise ImageCorrupt(
            "Input/output error", path=node.filename, structure="compressed data", offset=start
        )
    blob = memoryview(new_buffer(end - start))
    node.readv([(start, blob)])
    for unit in run:
        skip = unit.extent.host_offset - start
        unit.encoded = blob[skip : skip + unit.extent.stored_length]


def _copy(decoded: bytes | bytearray, extent: Extent, part: memoryview) -> None:
    skip = extent.guest_offset - extent.unit_offset
    if len(part) == len(decoded):
        part[:] = decoded
    else:
        part[:] = memoryview(decoded)[skip : skip + len(part)]
