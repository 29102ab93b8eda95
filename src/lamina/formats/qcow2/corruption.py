"""What happens when tables contradict themselves: one message, the corrupt bit, no more I/O."""

from __future__ import annotations

import errno
from collections.abc import Callable

from lamina.errors import ImageCorrupt, LaminaError, StorageError
from lamina.formats.qcow2.layout import INCOMPAT_CORRUPT
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header


class Corruption:
    """The first inconsistency found in an image that is open for writing ends its use.

    Going on would spread the damage: the image is marked, and every later request fails as if there
    was no medium. An image that is only read is merely reported, once.
    """

    def __init__(
        self, file: Node, header: Header, warn: Callable[[str], None], *, read_only: bool
    ) -> None:
        self.file = file
        self.header = header
        self.warn = warn
        self.read_only = read_only
        self.marked = False
        """No more requests are served."""
        self._reported = False

    def found(
        self, message: str, *, structure: str, offset: int | None = None, fatal: bool = True
    ) -> ImageCorrupt:
        """Report and mark; returns what the caller raises."""
        fatal = fatal and not self.read_only
        if fatal:
            if not self.marked:
                self.warn(
                    f"qcow2: Marking image as corrupt: {message}; further corruption events will "
                    "be suppressed"
                )
                self._mark()
        elif not self._reported:
            self._reported = True
            self.warn(
                f"qcow2: Image is corrupt: {message}; further non-fatal corruption events will be "
                "suppressed"
            )
        return ImageCorrupt(
            "Input/output error",
            path=self.file.filename,
            format="qcow2",
            structure=structure,
            field=message,
            offset=offset,
        )

    def _mark(self) -> None:
        self.marked = True
        if self.header.version < 3:
            return
        self.header.incompatible_features |= INCOMPAT_CORRUPT
        try:
            self.file.write(72, self.header.incompatible_features.to_bytes(8, "big"))
            self.file.flush()
        except LaminaError:
            # The image stays unusable in this process all the same.
            return

    def check(self) -> None:
        """Raises StorageError (ENOMEDIUM) once the image is marked."""
        if self.marked:
            raise StorageError.from_errno(getattr(errno, "ENOMEDIUM", errno.EIO))


def c_hex(number: int) -> str:
    """As C prints it with ``%#x``: zero has no prefix."""
    return f"{number:#x}" if number else "0"
