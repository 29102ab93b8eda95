"""open, close, reopen: which image the other commands work on, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamina.block.backend import Backend
from lamina.block.cache_modes import cache_mode
from lamina.block.keyvalue import parse_keyvalue
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.tools.arguments import Option, parse
from lamina.tools.io.commands import WrongArguments

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell

_AIO_MODES = ("threads", "native", "io_uring")
_DISCARD_MODES = ("ignore", "off", "unmap", "on")

_OPEN_OPTIONS = (
    *(Option(letter, "") for letter in "rsCnkU"),
    *(Option(letter, "", "mode") for letter in "itd"),
    Option("o", "", "options"),
)
_REOPEN_OPTIONS = (
    Option("r", ""),
    Option("w", ""),
    Option("c", "", "cache"),
    Option("o", "", "options"),
)


@dataclass(frozen=True)
class How:
    """What the switches of ``open``, and those of the tool itself, say about opening."""

    read_only: bool = False
    snapshot: bool = False
    copy_on_read: bool = False
    force_share: bool = False
    cache: str = "writeback"
    discard: str | None = "unmap"
    aio: str = "threads"
    format: str | None = None
    image_opts: bool = False


def how_to_open(switches: Iterable[tuple[str, Any]]) -> How:
    """``switches``: letters and their arguments, in order. Raises UsageError for a bad mode."""
    said: dict[str, Any] = {}
    for letter, argument in switches:
        if letter in _PLAIN:
            said[_PLAIN[letter]] = True
        elif letter == "n":
            said["cache"] = "none"
        elif letter == "k":
            said["aio"] = "native"
        elif letter == "t":
            cache_mode(argument)
            said["cache"] = argument
        elif letter == "d":
            _check_mode("discard", argument, _DISCARD_MODES)
            said["discard"] = argument
        elif letter == "i":
            _check_mode("aio", argument, _AIO_MODES)
            said["aio"] = argument
    return How(**said)


_PLAIN = {"r": "read_only", "s": "snapshot", "C": "copy_on_read", "U": "force_share"}


def _check_mode(what: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise UsageError(f"Invalid {what} option: {word}")


def open_image(
    shell: Shell, name: str | None, how: How, options: dict[str, Any] | None = None
) -> None:
    """Make an image the one that the shell works on. Raises what opening it raises."""
    options = dict(options or {})
    prefix = "can't open: " if name is None else f"can't open device {name}: "
    if how.image_opts and name is not None:
        options = {**parse_keyvalue(name, warn=shell.tool.warn), **options}
        name, prefix = None, "can't open: "
    try:
        if how.aio == "native" and not cache_mode(how.cache).direct:
            raise UsageError(
                "aio=native was specified, but it requires cache.direct=on, "
                "which was not specified."
            )
        if how.snapshot:
            from lamina.tools.io.temporary import open_with_overlay

            shell.image = open_with_overlay(shell.tool.session, name, how, options)
        else:
            shell.image = Backend.open(
                {} if name is None else name,
                session=shell.tool.session,
                format=how.format,
                writable=not how.read_only,
                cache=how.cache,
                force_share=how.force_share,
                discard=how.discard,
                copy_on_read=how.copy_on_read,
                options=options,
            )
    except LaminaError as error:
        raise error.in_context(prefix) from None
    shell.copies_on_read = how.copy_on_read


def run_open(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _OPEN_OPTIONS)
    how = how_to_open(given.given)
    options: dict[str, Any] = {}
    for text in given.values("o"):
        options.update(parse_keyvalue(text, warn=shell.tool.warn))
    if len(given.operands) > 1:
        raise WrongArguments
    if shell.image is not None:
        raise UsageError("file open already, try 'help close'")
    open_image(shell, given.operands[0] if given.operands else None, how, options)


def run_close(shell: Shell, arguments: Sequence[str]) -> None:
    shell.close()


def run_reopen(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _REOPEN_OPTIONS)
    directions = [key for key, _ in given.given if key in "rw"]
    if len(directions) > 1:
        raise UsageError("Only one -r/-w option may be given")
    if given.flag("c"):
        cache_mode(given.value("c"))
    if given.operands:
        raise WrongArguments
    options: dict[str, Any] = {}
    for text in given.values("o"):
        options.update(parse_keyvalue(text, warn=shell.tool.warn))
    if directions:
        if "read-only" in options:
            raise UsageError("Cannot set both -r/-w and 'read-only'")
        options["read-only"] = directions == ["r"]
    if given.flag("c") and any(key.startswith("cache.") for key in options):
        raise UsageError("Cannot set both -c and the cache options")
    writethrough = None
    if given.flag("c"):
        mode = cache_mode(given.value("c"))
        options["cache.direct"] = mode.direct
        options["cache.no-flush"] = mode.no_flush
        writethrough = not mode.writeback
    shell.wait()
    shell.backend.reopen_with(options, writethrough=writethrough)
