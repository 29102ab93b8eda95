"""Is this all zeroes? Asked of every buffer of a write when zeroes are to be detected."""

from __future__ import annotations

_ZERO_PAGE = bytes(4096)


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is 0. Data usually says no within the first page."""
    view = memoryview(data).cast("B")
    head = bytes(view[:4096])
    if head != _ZERO_PAGE[: len(head)]:
        return False
    # The page before is zero, and each page equals the one before it: memcmp at full speed.
    for start in range(4096, len(view), 1 << 20):
        part = bytes(view[start : start + (1 << 20)])
        if part.count(0) != len(part):
            return False
    return True
