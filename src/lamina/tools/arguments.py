"""Command lines as ``getopt_long`` reads them: QEMU's tools are called by scripts that rely on it.

Options and operands may be mixed, short options bundled (``-Uf raw``), long ones shortened to
any prefix that only one has, and ``--`` ends the options. Messages are those of the C library.
Options are handled from left to right, so that of two mistakes the first is the one reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from lamina.errors import UsageError
from lamina.hints import Any, NamedTuple
from lamina.units import _parse_size


class GetoptError(UsageError):
    """An argument that is no option, or one too many or too few; then where to find help."""


class WrongUsage(UsageError):
    """A command line that makes no sense; the tool adds where to find help."""


class Option(NamedTuple):
    """One option of a command, and what the help text says about it."""

    short: str
    """A letter, or nothing."""
    long: str
    """Without the dashes, or nothing."""
    argument: str = ""
    """What the help text calls its argument; nothing: it takes none."""
    help: str = ""
    read: Callable[[str], Any] = str
    """Makes a value of the argument's text. Raises UsageError (or WrongUsage)."""

    @property
    def key(self) -> str:
        return self.long or self.short


class Parsed:
    """What was given. Options are asked for by their key: the long name, or the letter."""

    def __init__(self, given: list[tuple[str, Any]], operands: list[str]) -> None:
        self.given = given
        """(key, value) of every option in the order given; value True where it takes none."""
        self.operands = operands
        self._last = dict(given)

    def flag(self, key: str) -> bool:
        return key in self._last

    def value(self, key: str, default: Any = None) -> Any:
        """Of the last occurrence."""
        return self._last.get(key, default)

    def values(self, key: str) -> list[Any]:
        return [value for known, value in self.given if known == key]


def parse(
    arguments: Sequence[str],
    options: Iterable[Option],
    *,
    permute: bool = True,
    stop_at: Iterable[str] = (),
) -> Parsed:
    """Raises GetoptError, or what an option's ``read`` raises.

    Without ``permute``, or with POSIXLY_CORRECT in the environment, the first operand ends the
    options. An option whose key is in ``stop_at`` (``help``) ends everything.
    """
    short = {option.short: option for option in options if option.short}
    long = {option.long: option for option in options if option.long}
    permute = permute and "POSIXLY_CORRECT" not in os.environ
    given: list[tuple[str, Any]] = []
    operands: list[str] = []
    rest = list(reversed(arguments))

    def take(option: Option, argument: str | None) -> bool:
        given.append((option.key, True if argument is None else option.read(argument)))
        return option.key in stop_at

    while rest:
        word = rest.pop()
        if word == "--":
            break
        if word.startswith("--") and long:
            name, equals, attached = word[2:].partition("=")
            option = _long(name, word, long)
            argument: str | None = None
            if option.argument:
                if not equals and not rest:
                    raise GetoptError(f"option '--{option.long}' requires an argument")
                argument = attached if equals else rest.pop()
            elif equals:
                raise GetoptError(f"option '--{option.long}' doesn't allow an argument")
            if take(option, argument):
                return Parsed(given, operands)
        elif word.startswith("-") and word != "-":
            letters = word[1:]
            while letters:
                letter, letters = letters[0], letters[1:]
                if letter not in short:
                    raise GetoptError(f"invalid option -- '{letter}'")
                option, argument = short[letter], None
                if option.argument:
                    if not letters and not rest:
                        raise GetoptError(f"option requires an argument -- '{letter}'")
                    argument, letters = letters or rest.pop(), ""
                if take(option, argument):
                    return Parsed(given, operands)
        elif permute:
            operands.append(word)
        else:
            rest.append(word)
            break
    return Parsed(given, operands + rest[::-1])


def _long(name: str, word: str, options: dict[str, Option]) -> Option:
    if name in options:
        return options[name]
    matches = [option for long, option in options.items() if long.startswith(name)]
    if not matches:
        raise GetoptError(f"unrecognized option '{word}'")
    if len(matches) > 1:
        which = " ".join(f"'--{option.long}'" for option in matches)
        raise GetoptError(f"option '{word}' is ambiguous; possibilities: {which}")
    return matches[0]


# What several commands share ---------------------------------------------------------------------


def output_format(text: str) -> bool:
    """Whether ``--output`` asks for JSON."""
    if text not in ("human", "json"):
        raise WrongUsage(f"--output expects 'human' or 'json' not '{text}'")
    return text == "json"


HELP = Option("h", "help", help="show this help and exit")
QUIET = Option("q", "quiet", help="print nothing but errors")
PROGRESS = Option("p", "progress", help="show how far the work has come")
FORMAT = Option("f", "format", "FMT", "format of the image; found out by looking if not given")
IMAGE_OPTS = Option(
    "", "image-opts", help="FILENAME is a list of options (driver=…,…) instead of a file name"
)
FORCE_SHARE = Option("U", "force-share", help="read although others may be writing to the image")
OBJECT = Option("", "object", "OBJDEF", "an object that the image needs, as TYPE,id=ID,…")
OUTPUT = Option("", "output", "human|json", "for people (default) or for programs", output_format)


# Lists of options (-o) and sizes -----------------------------------------------------------------


def option_list(text: str) -> str:
    """One ``-o``: no empty first or last entry, for several are joined with commas."""
    trailing = len(text) - len(text.rstrip(","))
    if not text or text.startswith(",") or trailing % 2:
        raise UsageError(f"Invalid option list: {text}")
    return text


OPTIONS = Option(
    "o", "options", "OPTIONS", "KEY=VALUE,… of the format; help lists them", option_list
)


def joined_options(given: Parsed, key: str = "options") -> str:
    """All ``-o`` as one list, nothing if there are none."""
    return ",".join(given.values(key))


MAX_SIZE = (1 << 63) - 1


def image_size(text: str, *, default_suffix: str = "b") -> int:
    """Bytes out of the size of an image as users write it. Raises UsageError in QEMU's words."""
    return _number(text, "image size", 0, MAX_SIZE, default_suffix)


def number(what: str, low: int = 0, high: int = MAX_SIZE) -> Callable[[str], int]:
    """Reads a number (or a size) between ``low`` and ``high``; errors say that it is ``what``."""
    return lambda text: _number(text, what, low, high, "b")


def _number(text: str, what: str, low: int, high: int, default_suffix: str) -> int:
    negative = text.lstrip().startswith("-")
    value = _parse_size(text.replace("-", "", 1) if negative else text, default_suffix)
    if value is None:
        raise UsageError(f"Invalid {what} specified: '{text}'.")
    if negative or not low <= value <= high:
        raise UsageError(f"Invalid {what} specified. Must be between {low} and {high}.")
    return value
