"""Numbers as commands take them."""

from __future__ import annotations

from lamina.tools.io.commands import CommandFailed
from lamina.units import _parse_size

MAX_REQUEST = (1 << 31) - 512
"""Bytes of one request."""
_LIMIT = 1 << 63


def number(text: str) -> int:
    """Bytes: ``64k``, ``1.5M``, ``0x200``, ``512``. Raises CommandFailed."""
    value = _parse_size(text, "b")
    if value is None:
        digits = text.lstrip().removeprefix("-")
        if digits != text.lstrip() and digits.isascii() and digits.isdigit():
            raise CommandFailed(f"Parsing error: argument too large -- {text}")
        raise CommandFailed(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- " + text
        )
    if value >= _LIMIT:
        raise CommandFailed(f"Parsing error: argument too large -- {text}")
    return value


def length(text: str) -> int:
    """Bytes of a request. Raises CommandFailed if they are too many."""
    value = number(text)
    if value > MAX_REQUEST:
        raise CommandFailed(f"length cannot exceed {MAX_REQUEST}, given {text}")
    return value


def total_length(texts: list[str]) -> int:
    """Bytes of a request with several buffers. Raises CommandFailed if they are too many."""
    total = 0
    for text in texts:
        value = number(text)
        if value > MAX_REQUEST:
            raise CommandFailed(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        total += value
        if total > MAX_REQUEST:
            raise CommandFailed(
                f"The total number of bytes exceed the maximum size {MAX_REQUEST}"
            )
    return total


def pattern_byte(text: str) -> int:
    """0 to 255, decimal, octal (``0…``) or hexadecimal (``0x…``). Raises CommandFailed."""
    value = c_integer(text)
    if value is None or not 0 <= value <= 255:
        raise CommandFailed(f"{text} is not a valid pattern byte")
    return value


def c_integer(text: str) -> int | None:
    """An integer as C's ``strtol`` reads it, the base told by its prefix; None if it is none."""
    body = text.lstrip()
    sign = -1 if body.startswith("-") else 1
    body = body[1:] if body.startswith(("-", "+")) else body
    base = 10
    if body[:2].lower() == "0x":
        base, body = 16, body[2:]
    elif body.startswith("0"):
        base = 8
    if not body.isascii() or not body.isalnum():
        return None
    try:
        return sign * int(body, base)
    except ValueError:
        return None


def check_sector_aligned(offset: int, count: int) -> None:
    """VM state and compressed data come in sectors. Raises CommandFailed."""
    for value, name in ((offset, "offset"), (count, "count")):
        if value % 512:
            raise CommandFailed(f"{value} is not a sector-aligned value for '{name}'")
