"""Finding zeroes in data quickly, without touching most of it.

Almost every block of real data begins with a word that is not zero, so one word of each block is
looked at, all of them in one strided pass; only blocks that begin with zeroes are compared whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Run = tuple[int, int]
"""Start and end."""

_ZEROES = memoryview(bytes(1 << 20))


def is_zero(buffer: bytearray, start: int, end: int) -> bool:
    """Whether these bytes are all zeroes."""
    while start < end:
        step = min(end - start, len(_ZEROES))
        if not buffer.startswith(_ZEROES[:step], start):
            return False
        start += step
    return True


def zero_runs(
    buffer: bytearray, start: int, end: int, granule: int, shortest: int = 0, phase: int = 0
) -> list[Run]:
    """Where ``buffer[start:end]`` is zero, in order.

    Zeroes are looked for in granules, of which one begins ``phase % granule`` bytes after
    ``start`` and incomplete ones may be at both ends. Runs of less than ``shortest`` bytes are not
    worth it, unless they are everything. ``start``, ``granule`` and ``phase`` are multiples of 8.
    """
    first = min(start + phase % granule, end)
    whole = (end - first) & ~7
    heads = memoryview(buffer)[first : first + whole].cast("Q")[:: granule // 8].tolist()
    if end - first > len(heads) * granule:
        # A last granule of less than a word.
        heads.append(0)
    edges = [*range(first, end, granule), end]
    if start < first:
        heads.insert(0, 0)
        edges.insert(0, start)
    runs: list[Run] = []
    count = len(heads)
    heads.append(0)  # where the search for the next zero ends
    number = heads.index(0)
    while number < count:
        beginning = number
        while number < count and not heads[number]:
            number += 1
        runs += _zero_parts(buffer, edges[beginning : number + 1])
        number = heads.index(0, number)
    if shortest > granule and runs != [(start, end)]:
        return [run for run in runs if run[1] - run[0] >= shortest]
    return runs


def _zero_parts(buffer: bytearray, edges: Sequence[int]) -> list[Run]:
    """The runs of zeroes in blocks that lie between these edges and begin with zeroes."""
    if is_zero(buffer, edges[0], edges[-1]):
        return [(edges[0], edges[-1])]
    runs: list[Run] = []
    for start, end in pairwise(edges):
        if is_zero(buffer, start, end):
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
    return runs


def between(runs: list[Run], start: int, end: int) -> list[Run]:
    """What of ``start``…``end`` the runs leave over."""
    rest: list[Run] = []
    for run_start, run_end in runs:
        if run_start > start:
            rest.append((start, run_start))
        start = run_end
    if start < end:
        rest.append((start, end))
    return rest
