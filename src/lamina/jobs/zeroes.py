"""Finding zeroes in data quickly, without touching most of it.

Almost every block of real data begins with a word that is not zero, so one word of each block is
looked at, all of them in one strided pass; only blocks that begin with zeroes are compared whole.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    positions: Sequence[int] = range(first, end, granule)
    if start < first:
        heads.insert(0, 0)
        positions = [start, *positions]
    if 0 not in heads:
        return []
    runs: list[Run] = []
    run_start = -1
    for number, position in enumerate(positions):
        if not heads[number]:
            stop = positions[number + 1] if number + 1 < len(positions) else end
            if is_zero(buffer, position, stop):
                if run_start < 0:
                    run_start = position
                continue
        if run_start >= 0:
            runs.append((run_start, position))
            run_start = -1
    if run_start >= 0:
        runs.append((run_start, end))
    if shortest > granule and runs != [(start, end)]:
        return [run for run in runs if run[1] - run[0] >= shortest]
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
