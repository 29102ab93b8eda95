"""Text of millions of lines out of arrays, without a Python object per line or number.

A line is a row of bytes that is as wide as the widest could be: what a number or a word does not
fill holds NULs, and these are dropped from all lines at once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    """One line per row."""

_GROUP = 4
"""Digits that are looked up at once."""


def lines(parts: Sequence[str | Bytes]) -> str:
    """The lines that these parts make: text that is the same in each, or a row for each."""
    count = next(len(part) for part in parts if not isinstance(part, str))
    widths = [len(part) if isinstance(part, str) else part.shape[1] for part in parts]
    rows = np.empty((count, sum(widths)), np.uint8)
    same = "".join(
        part if isinstance(part, str) else "\0" * width
        for part, width in zip(parts, widths, strict=True)
    )
    rows[:] = np.frombuffer(same.encode("ascii"), np.uint8)
    column = 0
    for part, width in zip(parts, widths, strict=True):
        if not isinstance(part, str):
            rows[:, column : column + width] = part
        column += width
    return rows.tobytes().replace(b"\0", b"").decode("ascii")


def decimal(values: npt.NDArray[np.int64]) -> Bytes:
    """Numbers; nothing for negative ones."""
    longest = len(str(max(int(values.max()), 0)))
    groups = -(-longest // _GROUP)
    text = np.empty((len(values), groups), np.uint32)
    rest = values
    for group in range(groups - 1, 0, -1):
        above = rest // 10**_GROUP
        text[:, group] = _group_texts()[rest - above * 10**_GROUP]
        rest = above
    text[:, 0] = _group_texts()[np.maximum(rest, 0)]
    digits = text.view(np.uint8)
    width = groups * _GROUP
    for power in range(1, width):
        digits[:, width - 1 - power][values < 10**power] = 0
    digits[:, width - 1][values < 0] = 0
    # What is empty in all lines (numbers of one block are alike) need not be dropped from each.
    return digits[:, width - longest :]


def words(texts: Sequence[str], index: npt.NDArray[Any]) -> Bytes:
    """``texts[index[i]]`` on line i."""
    width = max(map(len, texts))
    table = b"".join(text.encode("ascii").ljust(width, b"\0") for text in texts)
    rows: Bytes = np.frombuffer(table, np.uint8).reshape(len(texts), width)[index]
    return rows


@cache
def _group_texts() -> npt.NDArray[np.uint32]:
    """``0000`` to ``9999`` as the four bytes of a number each."""
    text = "".join(f"{number:0{_GROUP}}" for number in range(10**_GROUP))
    return np.frombuffer(text.encode("ascii"), np.uint32)
