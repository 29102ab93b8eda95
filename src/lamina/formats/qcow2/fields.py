"""What fields of several structures have in common: text, and the error for what cannot be."""

from __future__ import annotations

import errno

from lamina.errors import ImageCorrupt


def corrupt(message: str, *, structure: str, field: str, offset: int) -> ImageCorrupt:
    """The error for a figure that no image can have."""
    return ImageCorrupt(
        message,
        format="qcow2",
        structure=structure,
        field=field,
        offset=offset,
        errno=errno.EINVAL,
    )


def header_error(message: str, field: str, offset: int) -> ImageCorrupt:
    return corrupt(message, structure="header", field=field, offset=offset)


def text_of(data: bytes) -> str:
    """File names are bytes; what is not UTF-8 survives the way back."""
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """The other way round."""
    return text.encode("utf-8", "surrogateescape")
