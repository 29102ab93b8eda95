"""Memory that data is read into."""

from __future__ import annotations

import ctypes

from lamina.buffers import new_buffer

_MAPPED = 40 << 20
"""Bytes that allocators do not find room for among small things."""


def test_a_large_buffer_does_not_begin_where_copying_is_slow() -> None:
    buffer = new_buffer(_MAPPED)
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096 not in range(1, 32)


def test_it_is_as_long_as_asked_for_and_empty() -> None:
    for length in (0, 1, 64, 100_000):
        assert new_buffer(length) == bytes(length)
