"""preadv and pwritev for hosts that have neither (Windows): seek and transfer under a lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from lamina.hints import Any

_LARGEST = 1 << 30
"""Bytes: the C library's counts are ints."""

_position = threading.Lock()
"""A descriptor has one position; descriptors are few, so one lock serves them all."""


def preadv(fd: int, buffers: Sequence[Any], offset: int) -> int:
    done = 0
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        for buffer in buffers:
            data = os.read(fd, min(len(buffer), _LARGEST))
            buffer[: len(data)] = data
            done += len(data)
            if len(data) < len(buffer):
                break
    return done


def pwritev(fd: int, buffers: Sequence[Any], offset: int) -> int:
    done = 0
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        for buffer in buffers:
            count = os.write(fd, memoryview(buffer)[:_LARGEST])
            done += count
            if count < len(buffer):
                break
    return done
