"""Units that nobody can decode: they have their place in the map of a disk, but reading fails."""

from __future__ import annotations

from lamina.errors import ImageCorrupt
from lamina.hints import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lamina.codecs import Data


def decode(encoded: Data, length: int) -> NoReturn:
    """Raises ImageCorrupt."""
    raise ImageCorrupt("Input/output error", structure="compressed data")
