"""Is this all zeroes? Asked of every buffer of a write when zeroes are to be detected."""

from __future__ import annotations

_STEP = 1 << 16
_ZEROES = bytes(_STEP)


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is 0. Data usually says no within its first bytes."""
    view = memoryview(data).cast("B")
    if any(view[:16]):
        return False
    for start in range(0, len(view), _STEP):
        # Copied, because comparing memoryviews goes element by element.
        part = bytes(view[start : start + _STEP])
        if part != _ZEROES[: len(part)]:
            return False
    return True
