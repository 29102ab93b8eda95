"""read, readv, write, writev, discard: requests that are waited for."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import Option, Parsed, parse
from lamina.tools.io.commands import CommandFailed, WrongArguments
from lamina.tools.io.numbers import (
    MAX_REQUEST,
    check_sector_aligned,
    length,
    number,
    total_length,
)
from lamina.tools.io.transfer import (
    DEFAULT_PATTERN,
    PATTERN,
    filled_buffer,
    mismatch,
    new_buffer,
    outcome,
    switches,
    timed,
    write_flags,
)

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell

_READ = (
    *switches("bCpqrv"),
    PATTERN,
    Option("s", "", "off", read=number),
    Option("l", "", "len", read=number),
)
_READV = (*switches("Cqrv"), PATTERN)
_WRITE = (*switches("bcCfnpqruz"), PATTERN, Option("s", "", "source_file"))
_WRITEV = (*switches("Cfqr"), PATTERN)
_DISCARD = switches("Cq")


# -- reading ---------------------------------------------------------------------------------------


def run_read(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _READ)
    if len(given.operands) != 2:
        raise WrongArguments
    offset, count = number(given.operands[0]), length(given.operands[1])
    window = _window_to_verify(given, count)
    backend = shell.backend
    if not given.flag("b"):
        _read(shell, given, "read", offset, count, window)
        return
    check_sector_aligned(offset, count)
    node = backend.node.unfiltered
    buffer = new_buffer(shell, count)
    seconds = timed("read", lambda: node.read_vmstate(offset, buffer))
    _say_what_was_read(shell, given, offset, buffer, seconds, window)


def run_readv(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _READV)
    if len(given.operands) < 2:
        raise WrongArguments
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    _read(shell, given, "readv", offset, count, slice(0, count))


def _window_to_verify(given: Parsed, count: int) -> slice:
    """Which of the bytes read are compared with the pattern, as -s and -l say."""
    if (given.flag("s") or given.flag("l")) and not given.flag("P"):
        raise WrongArguments
    start: int = given.value("s", 0)
    end: int = start + given.value("l", max(count - start, 0))
    if start > count or end > count:
        raise CommandFailed("pattern verification range exceeds end of read data")
    return slice(start, end)


def _read(
    shell: Shell, given: Parsed, what: str, offset: int, count: int, window: slice
) -> None:
    backend, buffer = shell.backend, new_buffer(shell, count)
    seconds = timed(what, lambda: backend.readv([(offset, buffer)]))
    _say_what_was_read(shell, given, offset, buffer, seconds, window)


def _say_what_was_read(
    shell: Shell, given: Parsed, offset: int, buffer: memoryview, seconds: float, window: slice
) -> None:
    text = ""
    if given.flag("P"):
        text = mismatch(buffer[window], given.value("P"), offset + window.start)
        shell.failed |= bool(text)
    shell.say(text + outcome(given, "read", offset, len(buffer), seconds, buffer))


# -- writing ---------------------------------------------------------------------------------------


def run_write(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _WRITE)
    if len(given.operands) != 2:
        raise WrongArguments
    _refuse_contradictions(given)
    offset = number(given.operands[0])
    count = _write_length(given)
    backend, flags = shell.backend, write_flags(given)
    if given.flag("b") or given.flag("c"):
        check_sector_aligned(offset, count)
    if given.flag("z"):
        seconds = timed("write", lambda: backend.write_zeroes(offset, count, flags))
        shell.say(outcome(given, "wrote", offset, count, seconds, None))
        return
    data = _data_to_write(shell, given, count)
    if given.flag("b"):
        seconds = timed("write", lambda: backend.write_vmstate(offset, data))
    elif given.flag("c"):
        seconds = timed("write", lambda: backend.write_compressed([(offset, data)]))
    else:
        seconds = timed("write", lambda: backend.writev([(offset, data)], flags))
    shell.say(outcome(given, "wrote", offset, count, seconds, None))


def run_writev(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _WRITEV)
    if len(given.operands) < 2:
        raise WrongArguments
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    backend, flags = shell.backend, write_flags(given)
    data = filled_buffer(shell, count, given.value("P", DEFAULT_PATTERN))
    seconds = timed("writev", lambda: backend.writev([(offset, data)], flags))
    shell.say(outcome(given, "wrote", offset, count, seconds, None))


def _refuse_contradictions(given: Parsed) -> None:
    """Raises CommandFailed for options of ``write`` that do not go together."""
    flag = given.flag
    if flag("b") and flag("z"):
        raise CommandFailed("-b and -z cannot be specified at the same time")
    if flag("f") and (flag("b") or flag("c")):
        raise CommandFailed("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if flag(letter) and not flag("z"):
            raise CommandFailed(f"-{letter} requires -z to be specified")
    if flag("z") + flag("P") + flag("s") > 1:
        raise CommandFailed("Only one of -z, -P, and -s can be specified at the same time")
    if flag("r") and flag("z"):
        raise CommandFailed("cannot combine zero write with registered I/O buffer")


def _write_length(given: Parsed) -> int:
    """Zeroes that must not be written one by one may be as many as the disk has."""
    text = given.operands[1]
    count = number(text)
    if count > MAX_REQUEST and not given.flag("n"):
        without = " without -n" if given.flag("z") else ""
        raise CommandFailed(f"length cannot exceed {MAX_REQUEST}{without}, given {text}")
    return count


def _data_to_write(shell: Shell, given: Parsed, count: int) -> memoryview:
    if not given.flag("s"):
        return filled_buffer(shell, count, given.value("P", DEFAULT_PATTERN))
    name = given.value("s")
    try:
        with open(name, "rb") as file:
            content = file.read(count)
    except OSError as error:
        shell.complain(f"{name}: {error.strerror}")
        raise CommandFailed from None
    if not content:
        shell.complain(f"{name}: file is empty")
        raise CommandFailed
    buffer = new_buffer(shell, count)
    buffer[:] = (content * -(-count // len(content)))[:count]
    return buffer


# -- discarding ------------------------------------------------------------------------------------


def run_discard(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _DISCARD)
    if len(given.operands) != 2:
        raise WrongArguments
    offset, count = number(given.operands[0]), length(given.operands[1])
    backend = shell.backend
    seconds = timed("discard", lambda: backend.discard(offset, count))
    shell.say(outcome(given, "discard", offset, count, seconds, None))
