"""Lines from a person at a terminal: editing, a history, names of commands completed by TAB."""

from __future__ import annotations

import contextlib

from lamina.hints import TextIO
from lamina.tools.io.commands import COMMANDS
from lamina.tools.io.shell import PROMPT

_ready = False


def ask(_source: TextIO) -> str:
    """A line with its end; nothing when the person is done."""
    _prepare()
    try:
        return input(PROMPT) + "\n"
    except EOFError:
        print()
        return ""


def _prepare() -> None:
    global _ready
    if _ready:
        return
    _ready = True
    with contextlib.suppress(ImportError):  # not everywhere: Windows has no readline
        import readline

        readline.set_completer(_complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")


def _complete(begun: str, number: int) -> str | None:
    matches = [f"{name} " for name in COMMANDS if name.startswith(begun)]
    return matches[number] if number < len(matches) else None
