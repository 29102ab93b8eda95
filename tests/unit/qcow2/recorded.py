"""What a dirty bitmap has to say, by what the disk was when it began to record."""

from __future__ import annotations

from collections.abc import Iterable

SECTOR = 512


class Recorded:
    """Whatever differs from ``before``, in ``until`` or now, has been written since."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.before = bytearray(content)
        self.until: bytes | None = None
        """What the disk was when recording ended."""

    def stop(self, content: bytearray) -> None:
        if self.until is None:
            self.until = bytes(content)

    def go_on(self, content: bytearray) -> None:
        """What changed in between is not recorded."""
        if self.until is not None:
            for start in range(0, len(content), SECTOR):
                part = slice(start, start + SECTOR)
                if content[part] != self.until[part]:
                    self.before[part] = content[part]
            self.until = None

    def cut(self, size: int) -> None:
        """What the disk has lost it does not have to say anything about; nor about what is new."""
        del self.before[size:]
        if self.until is not None:
            self.until = self.until[:size]

    def check(self, content: bytearray, dirty: Iterable[tuple[int, int]]) -> None:
        """``dirty``: (offset, length) of what the bitmap says."""
        now = content if self.until is None else self.until
        rest = bytearray(now[: len(self.before)])
        for offset, length in dirty:
            rest[offset : offset + length] = self.before[offset : offset + length]
        assert rest == self.before[: len(rest)], "a write was not recorded"
