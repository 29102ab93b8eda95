"""Batches of requests as few system calls: neighbours merged, short transfers continued."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.node import ReadRequest, WriteRequest

preadv: Callable[[int, Sequence[Any], int], int]
pwritev: Callable[[int, Sequence[Any], int], int]
if hasattr(os, "preadv"):
    preadv, pwritev = os.preadv, os.pwritev
else:
    from lamina.protocols.file import positioned

    preadv, pwritev = positioned.preadv, positioned.pwritev

MAX_BUFFERS = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1024
"""Buffers that one call takes."""


def runs(
    requests: Sequence[ReadRequest] | Sequence[WriteRequest],
) -> list[tuple[int, list[Any], int]]:
    """(offset, buffers, bytes) of requests that adjoin in the order in which they come, at most
    MAX_BUFFERS of them together."""
    found: list[tuple[int, list[Any], int]] = []
    buffers: list[Any] = []
    start = end = -1
    for offset, buffer in requests:
        if offset == end and len(buffers) < MAX_BUFFERS:
            buffers.append(buffer)
            end += len(buffer)
        else:
            if buffers:
                found.append((start, buffers, end - start))
            start, end, buffers = offset, offset + len(buffer), [buffer]
    if buffers:
        found.append((start, buffers, end - start))
    return found


def rest(buffers: Sequence[Any], done: int) -> list[memoryview]:
    """What of ``buffers`` remains when the first ``done`` bytes are through."""
    remaining = []
    for buffer in buffers:
        if done < len(buffer):
            remaining.append(memoryview(buffer)[done:])
        done = max(done - len(buffer), 0)
    return remaining


def pieces(buffers: Sequence[Any], longest: int) -> Iterator[list[Any]]:
    """The same bytes, at most ``longest`` of them together."""
    piece: list[Any] = []
    room = longest
    for buffer in buffers:
        at = 0
        while at < len(buffer):
            part = memoryview(buffer)[at : at + room]
            piece.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield piece
                piece, room = [], longest
    if piece:
        yield piece


def continue_read(fd: int, buffers: Sequence[Any], offset: int, done: int) -> None:
    """Finish a read that returned after ``done`` bytes; behind the end of the file are zeroes."""
    while remaining := rest(buffers, done):
        count = preadv(fd, remaining, offset + done)
        if count == 0:
            for buffer in remaining:
                buffer[:] = bytes(len(buffer))
            return
        done += count


def continue_write(fd: int, buffers: Sequence[Any], offset: int, done: int) -> None:
    """Finish a write that returned after ``done`` bytes. Raises OSError."""
    while remaining := rest(buffers, done):
        done += pwritev(fd, remaining, offset + done)
