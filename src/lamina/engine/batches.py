"""Batches of write requests, taken apart: plain functions of offsets and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import WriteRequest

Buffer = bytes | bytearray | memoryview

ROUND = 32 << 20
"""Bytes of units that one round touches at most: a bound for the copies it holds."""

offset_of = itemgetter(0)


def layout(
    requests: Sequence[WriteRequest], unit: int
) -> tuple[list[tuple[int, int]], bool, bool]:
    """Of sorted requests: the units that they touch, as (start, end); whether some overlap; whether
    some share a unit without adjoining."""
    units: list[tuple[int, int]] = []
    overlapping = sharing = False
    end = start = stop = -1
    for offset, data in requests:
        if offset != end:
            if offset < end:
                overlapping = True
            if offset < stop:
                sharing = True
        if offset > stop:
            if stop > start:
                units.append((start, stop))
            start = offset // unit * unit
        end = max(end, offset + len(data))
        stop = -(-end // unit) * unit
    units.append((start, stop))
    return units, overlapping, sharing


def rounds(requests: Sequence[WriteRequest], unit: int) -> Iterator[list[WriteRequest]]:
    """Sorted requests in groups that overlap nowhere and share no unit unless they adjoin."""
    waiting = list(requests)
    most = max(ROUND // unit, 1)
    while waiting:
        group: list[WriteRequest] = []
        later: list[WriteRequest] = []
        end = -unit
        for request in waiting:
            offset = request[0]
            fits = offset == end or (offset > end and offset // unit != (end - 1) // unit)
            if fits and len(group) < most:
                group.append(request)
                end = offset + len(request[1])
            else:
                later.append(request)
        yield group
        waiting = later


def merged(requests: Sequence[WriteRequest]) -> list[tuple[int, int]]:
    """(offset, length) of sorted requests; those that adjoin are one."""
    result: list[tuple[int, int]] = []
    start = end = -1
    for offset, data in requests:
        if offset != end:
            if end > start:
                result.append((start, end - start))
            start = offset
        end = offset + len(data)
    result.append((start, end - start))
    return result


class Payload:
    """The bytes of sorted requests, taken out run by run in ascending order."""

    def __init__(self, requests: Sequence[WriteRequest]) -> None:
        self._requests = requests
        self._at = 0

    def take(self, guest_offset: int, length: int) -> list[Buffer]:
        """The buffers that hold this run; it may span requests that adjoin."""
        parts: list[Buffer] = []
        end = guest_offset + length
        while guest_offset < end:
            offset, data = self._requests[self._at]
            if offset + len(data) <= guest_offset:
                self._at += 1
                continue
            skip = guest_offset - offset
            stop = min(end - offset, len(data))
            whole = skip == 0 and stop == len(data)
            parts.append(data if whole else memoryview(data)[skip:stop])
            guest_offset = offset + stop
        return parts


def place(host_offset: int, parts: Sequence[Buffer]) -> list[WriteRequest]:
    """One write per buffer, one behind the other."""
    writes: list[WriteRequest] = []
    for part in parts:
        writes.append((host_offset, part))
        host_offset += len(part)
    return writes


def chunks(parts: Sequence[Buffer], step: int) -> Iterator[bytearray]:
    """Copies of the bytes of ``parts``, ``step`` at a time."""
    chunk = bytearray()
    for part in parts:
        view = memoryview(part)
        while view:
            room = step - len(chunk)
            chunk += view[:room]
            view = view[room:]
            if len(chunk) == step:
                yield chunk
                chunk = bytearray()
    if chunk:
        yield chunk
