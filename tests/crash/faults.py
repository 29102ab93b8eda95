"""Storage whose requests fail."""

from __future__ import annotations

import errno

from lamina.errors import StorageError


class Fault:
    """Fails request number ``at``, or every one from there on."""

    def __init__(self, at: int, *, for_ever: bool = False) -> None:
        self.at = at
        self.for_ever = for_ever
        self.seen = 0

    def __call__(self, kind: str, offset: int, length: int) -> None:
        self.seen += 1
        if self.seen == self.at or (self.for_ever and self.seen > self.at):
            raise StorageError.from_errno(errno.EIO)
