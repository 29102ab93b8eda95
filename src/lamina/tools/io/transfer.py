"""What reading and writing share, whether somebody waits for it or not."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from lamina.block.limits import WriteFlags
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.arguments import Option, Parsed
from lamina.tools.io.commands import CommandFailed
from lamina.tools.io.numbers import pattern_byte
from lamina.tools.io.report import hexdump, report

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell

DEFAULT_PATTERN = 0xCD
_MISALIGNMENT = 16 + 1
"""Bytes behind the start of an allocation: an odd address."""
_PIECE = 1 << 16

PATTERN = Option("P", "", "pattern", read=pattern_byte)


def switches(letters: str) -> tuple[Option, ...]:
    """Options without arguments."""
    return tuple(Option(letter, "") for letter in letters)


# -- buffers ---------------------------------------------------------------------------------------


def new_buffer(shell: Shell, length: int) -> memoryview:
    """Room for ``length`` bytes; at an odd address if the user wants to see how that goes."""
    skip = _MISALIGNMENT if shell.misalign else 0
    return memoryview(bytearray(length + skip))[skip:]


def filled_buffer(shell: Shell, length: int, byte: int) -> memoryview:
    if not shell.misalign:
        return memoryview(bytes((byte,)) * length)
    buffer = new_buffer(shell, length)
    buffer[:] = bytes((byte,)) * length
    return buffer


def holds_only(buffer: memoryview, byte: int) -> bool:
    piece = bytes((byte,)) * min(len(buffer), _PIECE)
    for start in range(0, len(buffer), _PIECE):
        part = buffer[start : start + _PIECE]
        if bytes(part) != piece[: len(part)]:
            return False
    return True


# -- requests --------------------------------------------------------------------------------------


def timed(what: str, request: Callable[[], Any]) -> float:
    """Seconds that ``request`` took. Raises CommandFailed: ``what failed: …``.

    Only the text of the nearest POSIX error is said of a request that failed.
    """
    start = time.perf_counter()
    try:
        request()
    except (LaminaError, MemoryError) as error:
        number = error.errno if isinstance(error, LaminaError) else errno.ENOMEM
        raise CommandFailed(f"{what} failed: {os.strerror(number)}") from None
    return time.perf_counter() - start


def write_flags(given: Parsed) -> WriteFlags:
    """Of the options -f, -u and -n."""
    flags = WriteFlags.NONE
    if given.flag("f"):
        flags |= WriteFlags.FUA
    if given.flag("u"):
        flags |= WriteFlags.MAY_UNMAP
    if given.flag("n"):
        flags |= WriteFlags.NO_FALLBACK
    return flags


# -- what is said of them --------------------------------------------------------------------------


def mismatch(buffer: memoryview, byte: int, offset: int) -> str:
    """A line if not all of the bytes, which begin at the guest offset ``offset``, are ``byte``."""
    if holds_only(buffer, byte):
        return ""
    return f"Pattern verification failed at offset {offset}, {len(buffer)} bytes\n"


def outcome(
    given: Parsed, verb: str, offset: int, length: int, seconds: float, dump: memoryview | None
) -> str:
    """The report of a finished request as the options -q, -v and -C want it."""
    if given.flag("q"):
        return ""
    text = ""
    if dump is not None and given.flag("v"):
        text = "".join(hexdump(dump, offset))
    return text + report(verb, offset, length, length, seconds, for_programs=given.flag("C"))
