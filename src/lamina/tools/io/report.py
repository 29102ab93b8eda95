"""What is said about a finished request, and bytes shown in hexadecimal."""

from __future__ import annotations

from collections.abc import Iterator

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def amount(value: float) -> str:
    """``64 KiB``, ``1.500 KiB``, ``0.967491 bytes``: as many units of 1024 as fit.

    Digits from ``.000`` on are left out, whatever follows.
    """
    power = 0
    while value >= 1 << (10 * (power + 1)) and power + 1 < len(_UNITS):
        power += 1
    scaled = value / (1 << (10 * power))
    text = f"{scaled:.3f}" if power else f"{scaled:f}"
    return f"{text.partition('.000')[0]} {_UNITS[power]}"


def elapsed(seconds: float, *, terse: bool = False) -> str:
    """``00.03 sec`` below a minute, else (and always if ``terse``) ``0:01:02.33``."""
    hundredths = int(seconds * 100 + 0.5)
    whole, hundredths = divmod(hundredths, 100)
    if whole < 60 and not terse:
        return f"{whole:02}.{hundredths:02} sec"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}.{hundredths:02}"


def report(
    verb: str, offset: int, done: int, wanted: int, seconds: float, *, for_programs: bool = False
) -> str:
    """Two lines for people (``wrote 512/512 bytes at offset 0``, …), or one for programs."""
    seconds = max(seconds, 1e-9)
    rate, frequency = done / seconds, 1 / seconds
    if for_programs:
        time = elapsed(seconds, terse=True)
        return f"{done},1,{time},{rate:.3f},{frequency:.3f}\n"
    return (
        f"{verb} {done}/{wanted} bytes at offset {offset}\n"
        f"{amount(done)}, 1 ops; {elapsed(seconds)} ({amount(rate)}/sec"
        f" and {frequency:.4f} ops/sec)\n"
    )


_SHOWN = "".join(
    chr(code) if chr(code).isalnum() and code < 128 else "." for code in range(256)
)


def hexdump(data: bytes | bytearray | memoryview, offset: int) -> Iterator[str]:
    """Lines of 16 bytes: address, hexadecimal, and whatever is an ASCII letter or digit."""
    for start in range(0, len(data), 16):
        row = bytes(data[start : start + 16])
        text = "".join(_SHOWN[code] for code in row)
        yield f"{offset + start:08x}:  {row.hex(' ')}  {text}\n"
