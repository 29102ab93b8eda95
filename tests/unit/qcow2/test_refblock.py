"""Refcount blocks of all widths against a plain list of numbers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.formats.qcow2.refblock import Width

BLOCK = 64
"""Bytes."""


@pytest.mark.parametrize(
    ("order", "expected"), [(0, "ff01"), (1, "555501"), (2, "1111111101"), (3, "01" * 9)]
)
def test_nine_clusters(order: int, expected: str) -> None:
    """As QEMU packs them."""
    block = bytearray(BLOCK)
    Width(order).fill(block, 0, 9, 1)
    assert block == bytes.fromhex(expected).ljust(BLOCK, b"\0")


@pytest.mark.parametrize("order", range(7))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), density=st.floats(0, 1))
def test_against_a_list(order: int, seed: int, density: float) -> None:
    rng = random.Random(seed)
    width = Width(order)
    block = bytearray(BLOCK)
    total = width.entries(BLOCK)
    assert total == BLOCK * 8 // width.bits
    numbers = [0] * total
    for _ in range(rng.randrange(12)):
        first = rng.randrange(total)
        count = rng.randint(1, total - first)
        value = 0 if rng.random() > density else rng.choice([1, width.maximum, 1])
        before = bytes(block)
        width.fill(block, first, count, value)
        numbers[first : first + count] = [value] * count
        start, length = width.changed(first, count)
        assert before[:start] == block[:start]
        assert before[start + length :] == block[start + length :]
    assert [width.get(block, index) for index in range(total)] == numbers
    start = rng.randrange(total)
    end = rng.randint(start, total)
    used = [index for index in range(start, end) if numbers[index]]
    free = [index for index in range(start, total) if not numbers[index]]
    assert width.next_used(block, start, end) == (used[0] if used else end)
    assert width.next_free(block, start) == (free[0] if free else total)
    assert width.count_used(block) == sum(map(bool, numbers))
    assert width.last_used(block) == max((i for i in range(total) if numbers[i]), default=-1)
    if end > start:
        runs = width.runs(block, start, end - start)
        spelled = [value for _, count, value in runs for _ in range(count)]
        assert spelled == numbers[start:end]
        assert [first for first, _, _ in runs] == [
            start + sum(count for _, count, _ in runs[:position]) for position in range(len(runs))
        ]


def test_zeroes_that_span_two_entries() -> None:
    width = Width(4)
    block = bytearray(b"\1\0\0\1" * 16)
    assert width.next_free(block, 0) == 32
    block[40:42] = b"\0\0"
    assert width.next_free(block, 0) == 20
