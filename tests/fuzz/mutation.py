"""Mutating valid files into ones that nobody would write."""

from __future__ import annotations

import random

_INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x01",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\0\0\0\0\0\0\0\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\x80\0\0\0\0\0\0\0",
    b"\0\xff\xff\xff\xff\xff\xfe\0",
    b"\0\0\0\0\0\x01\0\0",
    b"\0\0\0\0\0\0\x10\0",
)


def mutate(rng: random.Random, seed: bytes, spans: list[tuple[int, int]]) -> bytearray:
    """``seed`` with one to six changes inside of ``spans``, (start, end) each.

    Numbers are hit at their own offsets more often than not, and some files end early.
    """
    image = bytearray(seed)
    for _ in range(1 + int(rng.random() ** 3 * 6)):
        start, end = spans[int(rng.random() * len(spans))]
        place = start + int(rng.random() * (end - start))
        kind = rng.random()
        if kind < 0.35:
            image[place] ^= 1 << int(rng.random() * 8)
        elif kind < 0.75:
            value = _INTERESTING[int(rng.random() * len(_INTERESTING))]
            place -= place % len(value)
            image[place : place + len(value)] = value
        elif kind < 0.9:
            image[place] = int(rng.random() * 256)
        elif kind < 0.98:
            # A number of this file, where it does not belong.
            other = start + int(rng.random() * (end - start))
            place -= place % 8
            other -= other % 8
            image[place : place + 8] = image[other : other + 8]
        else:
            del image[place:]
            break
        if len(image) != len(seed):
            del image[len(seed) :]
    return image
