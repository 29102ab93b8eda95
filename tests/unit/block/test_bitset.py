"""Sets of bits, beside sets of numbers."""

from __future__ import annotations

import random

import pytest

from lamina.block.bitset import CHUNK_BITS, CHUNK_BYTES, Bitset


def bits_of(bits: Bitset, end: int) -> set[int]:
    found: set[int] = set()
    last = -1
    for first, stop in bits.runs(0, end):
        assert last < first < stop <= end, "runs are in order and apart"
        last = stop
        found.update(range(first, stop))
    return found


@pytest.mark.parametrize("end", [70, 3 * CHUNK_BITS + 5])
@pytest.mark.parametrize("seed", range(8))
def test_like_a_set(end: int, seed: int) -> None:
    rng = random.Random(seed)
    bits, model = Bitset(), set[int]()
    for _ in range(25):
        first = rng.randrange(end)
        if rng.random() < 0.4:
            first = first // CHUNK_BITS * CHUNK_BITS
        stop = min(first + rng.choice([1, 7, 8, 9, 100, CHUNK_BITS, 2 * CHUNK_BITS]), end)
        before = {number: bits.read(number * CHUNK_BYTES, CHUNK_BYTES) for number in range(4)}
        bits.changed.clear()
        match rng.randrange(4):
            case 0:
                bits.add(first)
                model.add(first)
            case 1 | 2:
                bits.add_run(first, stop)
                model.update(range(first, stop))
            case 3:
                bits.discard_run(first, stop)
                model.difference_update(range(first, stop))
        for number, old in before.items():
            if bits.read(number * CHUNK_BYTES, CHUNK_BYTES) != old:
                assert number in bits.changed
        assert len(bits) == len(model)
    assert bits_of(bits, end) == model
    first, stop = sorted((rng.randrange(end), rng.randrange(end + 1)))
    part = {bit for low, high in bits.runs(first, stop) for bit in range(low, high)}
    assert part == {bit for bit in model if first <= bit < stop}
    assert all((bit in bits) == (bit in model) for bit in rng.sample(range(end), 30))


@pytest.mark.parametrize("seed", range(4))
def test_bytes_go_in_and_out(seed: int) -> None:
    rng = random.Random(seed)
    length = 2 * CHUNK_BYTES + 100
    data = bytearray(rng.randbytes(length))
    data[5 : CHUNK_BYTES + 300] = bytes([rng.choice([0, 255])]) * (CHUNK_BYTES + 295)
    bits = Bitset()
    step = rng.choice([512, 4096, length])
    for start in range(0, length, step):
        bits.load(start, data[start : start + step])
    assert not bits.changed
    assert bits.read(0, length) == data
    assert bits.read(17, CHUNK_BYTES) == data[17 : 17 + CHUNK_BYTES]
    assert len(bits) == int.from_bytes(data, "little").bit_count()
    bits.load_ones(3, CHUNK_BYTES * 2)
    data[3 : 3 + 2 * CHUNK_BYTES] = b"\xff" * (2 * CHUNK_BYTES)
    assert bits.read(0, length) == data


def test_what_is_empty_or_full_costs_nothing() -> None:
    bits = Bitset()
    bits.load(0, bytes(10 * CHUNK_BYTES))
    assert bits.chunks == []
    bits.add_run(0, CHUNK_BITS << 16)
    assert len(bits) == CHUNK_BITS << 16
    assert len({id(chunk) for chunk in bits._chunks.values()}) == 1
    bits.discard_run(CHUNK_BITS + 1, CHUNK_BITS + 2)
    assert list(bits.runs(0, 1 << 40)) == [
        (0, CHUNK_BITS + 1),
        (CHUNK_BITS + 2, CHUNK_BITS << 16),
    ]
    bits.clear()
    assert bits.chunks == []
    assert list(bits.runs(0, 1 << 60)) == []


@pytest.mark.parametrize("seed", range(4))
def test_merging(seed: int) -> None:
    rng = random.Random(seed)
    sets = []
    for _ in range(2):
        one = Bitset()
        for _ in range(10):
            first = rng.choice([rng.randrange(4 * CHUNK_BITS), rng.randrange(4) * CHUNK_BITS])
            one.add_run(first, first + rng.choice([1, 1000, CHUNK_BITS]))
        one.changed.clear()
        sets.append(one)
    target, source = sets
    both = bits_of(target, 5 * CHUNK_BITS) | bits_of(source, 5 * CHUNK_BITS)
    unchanged = source.read(0, 5 * CHUNK_BYTES)
    before = {number: target.read(number * CHUNK_BYTES, CHUNK_BYTES) for number in range(5)}
    target.update(source)
    assert bits_of(target, 5 * CHUNK_BITS) == both
    for number, old in before.items():
        if target.read(number * CHUNK_BYTES, CHUNK_BYTES) != old:
            assert number in target.changed
    # What was taken over is a copy.
    target.discard_run(0, 5 * CHUNK_BITS)
    assert source.read(0, 5 * CHUNK_BYTES) == unchanged
    assert not source.changed
