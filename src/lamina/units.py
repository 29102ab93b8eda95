"""Sizes as people write them and as QEMU's tools print them. Bytes everywhere; powers of 1024."""

from __future__ import annotations

from lamina.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SECTOR = 512
"""Bytes. Only layouts and QEMU's texts count in sectors."""
PAGE = 4096
"""Bytes that host files have or have not: less need not be told apart in what reads as zeroes."""

_SUFFIXES = "BKMGTPE"
_HEXADECIMAL = "0123456789abcdefABCDEF"
_LONGEST = 1000
"""Characters. Python refuses to make numbers of very long texts."""


def parse_size(text: str, *, default_suffix: str = "b") -> int:
    """Bytes from ``"64k"``, ``"1.5M"``, ``"0x400"``, ``"123"``. Raises UsageError.

    ``b`` means bytes; a hexadecimal number takes no suffix; a fraction needs one.
    """
    value = _parse_size(text, default_suffix)
    if value is None:
        raise UsageError(f"Invalid size: '{text}'")
    return value


def _parse_size(text: str, default_suffix: str) -> int | None:
    body = text.lstrip().removeprefix("+")
    if len(body) > _LONGEST:
        return None
    if body[:2].lower() == "0x":
        digits = body[2:]
        return int(digits, 16) if digits and not digits.strip(_HEXADECIMAL) else None
    suffix = default_suffix.upper()
    if body and body[-1].upper() in _SUFFIXES:
        suffix, body = body[-1].upper(), body[:-1]
    unit = 1 << (10 * _SUFFIXES.index(suffix))
    whole, _, fraction = body.partition(".")
    if not (whole + fraction).isascii() or not (whole + fraction).isdigit():
        return None
    part = int(fraction or "0") / 10 ** len(fraction)
    if part and unit == 1:
        return None
    return int(whole or "0") * unit + int(part * unit + 0.5)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    return value // unit * unit


def size_to_str(value: int) -> str:
    """As QEMU prints sizes: three significant digits, a binary unit (``1.99 TiB``, ``512 B``)."""
    power = max(value.bit_length() - 1, 0) // 10
    # 1000…1023 of a unit would need four digits: QEMU shows them as 0.98 of the next one.
    if value >> (10 * power) >= 1000:
        power += 1
    if power == 0:
        return f"{value} B"
    return f"{value / (1 << (10 * power)):.3g} {'KMGTPE'[power - 1]}iB"
