"""Any request made into aligned ones of bounded size, for storage that takes no others.

A node whose ``limits.request_alignment`` is above 1 (O_DIRECT files, devices with 4 KiB sectors,
blkdebug with ``align``) puts an ``Aligner`` in front of its storage. Its users then need not align
anything: the limits tell them what is quick, not what is allowed.

A write that begins or ends inside a block is a read-modify-write: read the first and the last
block, put the new bytes between, write whole blocks. Nobody else may write to those blocks
meanwhile, so such a write has its range for itself, while aligned ones only exclude those.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from lamina.block.limits import Limits, WriteFlags
from lamina.block.node import Node, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.errors import Refused
from lamina.hints import TYPE_CHECKING, Any, Protocol
from lamina.units import round_down, round_up

if TYPE_CHECKING:
    from mmap import mmap

Range = tuple[int, int]
"""Start and end, in bytes."""


class AlignedStorage(Protocol):
    """What an ``Aligner`` stands in front of: takes requests that respect ``limits``."""

    @property
    def limits(self) -> Limits: ...

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None: ...
    def aligned_writev(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None: ...
    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None: ...
    def aligned_discard(self, offset: int, length: int) -> None: ...
    def event(self, name: str) -> None: ...


class Aligner:
    """Turns requests of any shape into those that ``storage`` takes."""

    def __init__(self, storage: AlignedStorage) -> None:
        self._storage = storage
        self._writes = RangeLocks()

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        limits = self._storage.limits
        alignment = limits.request_alignment
        whole = [one for one in requests if not (one[0] | len(one[1])) % alignment]
        if whole:
            self._storage.aligned_readv(fragments(whole, limits.max_transfer))
        if len(whole) == len(requests):
            return
        for offset, buffer in requests:
            if not (offset | len(buffer)) % alignment or not len(buffer):
                continue
            start = round_down(offset, alignment)
            end = round_up(offset + len(buffer), alignment)
            with aligned_buffer(end - start) as block:
                self._read(start, block)
                buffer[:] = block[offset - start : offset - start + len(buffer)]

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        alignment = self._storage.limits.request_alignment
        whole = [one for one in requests if not (one[0] | len(one[1])) % alignment]
        if whole:
            with self._writes.shared([(at, at + len(data)) for at, data in whole]):
                self._write(whole, flags)
        if len(whole) == len(requests):
            return
        for offset, data in requests:
            if (offset | len(data)) % alignment and len(data):
                self._read_modify_write(offset, data, flags)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Whole blocks by the storage's own means, the rest of the first and last one written."""
        alignment = self._storage.limits.request_alignment
        end = offset + length
        start, stop = round_down(offset, alignment), round_up(end, alignment)
        body_start, body_end = round_up(offset, alignment), round_down(end, alignment)
        if (start, stop) == (offset, end):
            with self._writes.shared([(start, stop)]):
                self._zero(start, stop, flags)
        elif body_start >= body_end:
            self._read_modify_write(offset, bytes(length), flags & WriteFlags.FUA)
        else:
            with self._writes.exclusive((start, stop)), aligned_buffer(2 * alignment) as edges:
                self._read_edges(offset, end, start, stop, edges)
                if start < offset:
                    edges[offset - start : alignment] = bytes(body_start - offset)
                    self._write([(start, edges[:alignment])], flags & WriteFlags.FUA)
                self._zero(body_start, body_end, flags)
                if end < stop:
                    edges[alignment : alignment + end - body_end] = bytes(end - body_end)
                    self._write([(body_end, edges[alignment:])], flags & WriteFlags.FUA)

    def discard(self, offset: int, length: int) -> None:
        """Whole blocks only: parts of one cannot be given back."""
        limits = self._storage.limits
        alignment = limits.request_alignment
        start, end = round_up(offset, alignment), round_down(offset + length, alignment)
        unit = max(alignment, limits.discard_alignment)
        with self._writes.shared([(start, end)]):
            for at, part in pieces(start, end, unit, limits.max_discard):
                self._storage.aligned_discard(at, part)

    # -- aligned from here on --------------------------------------------------------------------

    def _read(self, offset: int, buffer: memoryview) -> None:
        limit = self._storage.limits.max_transfer
        self._storage.aligned_readv(fragments([(offset, buffer)], limit))

    def _write(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        self._storage.event("pwritev")
        limit = self._storage.limits.max_transfer
        self._storage.aligned_writev(fragments(requests, limit), flags)
        self._storage.event("pwritev_done")

    def _zero(self, start: int, end: int, flags: WriteFlags) -> None:
        limits = self._storage.limits
        self._storage.event("pwritev_zero")
        unit = max(limits.request_alignment, limits.write_zeroes_alignment)
        for at, part in pieces(start, end, unit, limits.max_write_zeroes):
            self._storage.aligned_write_zeroes(at, part, flags)
        self._storage.event("pwritev_done")

    def _read_modify_write(
        self, offset: int, data: bytes | bytearray | memoryview, flags: WriteFlags
    ) -> None:
        alignment = self._storage.limits.request_alignment
        end = offset + len(data)
        start, stop = round_down(offset, alignment), round_up(end, alignment)
        with self._writes.exclusive((start, stop)), aligned_buffer(stop - start) as block:
            self._read_edges(offset, end, start, stop, block)
            block[offset - start : end - start] = data
            self._write([(start, block)], flags)

    def _read_edges(self, offset: int, end: int, start: int, stop: int, block: memoryview) -> None:
        """Fill the first and last block of ``block`` with those of the range, where needed."""
        alignment = self._storage.limits.request_alignment
        event = self._storage.event
        head, tail = offset > start, end < stop
        if head and tail and stop - start == alignment:  # one block is both
            event("pwritev_rmw_head")
            event("pwritev_rmw_tail")
            self._read(start, block)
            event("pwritev_rmw_after_head")
            event("pwritev_rmw_after_tail")
            return
        if head:
            event("pwritev_rmw_head")
            self._read(start, block[:alignment])
            event("pwritev_rmw_after_head")
        if tail:
            event("pwritev_rmw_tail")
            self._read(stop - alignment, block[-alignment:])
            event("pwritev_rmw_after_tail")


def fragments(requests: Sequence[Any], limit: int) -> Sequence[Any]:
    """The same requests, none of them longer than ``limit`` bytes (0: any length)."""
    if not limit or all(len(buffer) <= limit for _, buffer in requests):
        return requests
    return [
        (offset + skip, memoryview(buffer)[skip : skip + limit])
        for offset, buffer in requests
        for skip in range(0, len(buffer), limit)
    ]


def pieces(start: int, end: int, unit: int, limit: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of parts no longer than ``limit`` that meet at multiples of ``unit``.

    The unit need not be a power of two. A limit below it, or 0, is none.
    """
    step = limit // unit * unit
    while start < end:
        stop = min(end, round_down(start, unit) + step) if step else end
        yield start, stop - start
        start = stop


def check_resizable(node: Node, perm: Perm) -> None:
    """Writing the last, partial block makes the image longer: that must be permitted.

    Raises Refused.
    """
    if perm & Perm.WRITE and not perm & Perm.RESIZE and node.size % node.limits.request_alignment:
        raise Refused(
            "Cannot get 'write' permission without 'resize': "
            "Image size is not a multiple of request alignment",
            errno=errno.EINVAL,
        )


class RangeLocks:
    """Ranges of bytes in use: shared ones exclude only exclusive ones.

    A claim waits for those under way that exclude it, not for those that wait themselves: beside
    them there may be room. When something ends, whoever has waited longest goes first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._granted: list[_Claim] = []
        self._waiting: list[_Claim] = []
        """In the order in which they came."""

    def shared(self, ranges: Sequence[Range]) -> AbstractContextManager[None]:
        """All of ``ranges`` at once: a batch that held some and waited for others could hang."""
        return self._hold(_Claim(ranges, exclusive=False))

    def exclusive(self, range: Range) -> AbstractContextManager[None]:
        return self._hold(_Claim((range,), exclusive=True))

    @contextmanager
    def _hold(self, claim: _Claim) -> Iterator[None]:
        try:
            with self._changed:
                if not self._grant(claim):
                    self._waiting.append(claim)
                    self._changed.wait_for(lambda: claim in self._granted)
            yield
        finally:
            with self._changed:
                (self._granted if claim in self._granted else self._waiting).remove(claim)
                self._waiting = [one for one in self._waiting if not self._grant(one)]
                self._changed.notify_all()

    def _grant(self, claim: _Claim) -> bool:
        """False: something under way excludes it."""
        if any(other.excludes(claim) for other in self._granted):
            return False
        self._granted.append(claim)
        return True


class _Claim:
    def __init__(self, ranges: Sequence[Range], *, exclusive: bool) -> None:
        self._ranges = ranges
        self._exclusive = exclusive

    def excludes(self, other: _Claim) -> bool:
        return (self._exclusive or other._exclusive) and any(
            start < other_end and other_start < end
            for start, end in self._ranges
            for other_start, other_end in other._ranges
        )


_spare_buffers: list[mmap] = []
_SPARE_SIZE = 1 << 20
"""Bytes. Larger buffers are made anew each time."""


@contextmanager
def aligned_buffer(length: int) -> Iterator[memoryview]:
    """``length`` bytes that start at a page: what O_DIRECT takes. Undefined content."""
    from mmap import mmap

    if length > _SPARE_SIZE:
        yield memoryview(mmap(-1, length))
        return
    try:
        buffer = _spare_buffers.pop()
    except IndexError:
        buffer = mmap(-1, _SPARE_SIZE)
    try:
        yield memoryview(buffer)[:length]
    finally:
        _spare_buffers.append(buffer)
