"""Commands about durability and size, about time and signals, and the way out."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from lamina.block.limits import Preallocation
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import Option, parse
from lamina.tools.io.commands import CommandFailed, WrongArguments
from lamina.tools.io.numbers import c_integer, number
from lamina.tools.io.shell import Quit

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell

_TRUNCATE = (Option("m", "", "mode"),)
_LONGEST_SLEEP = 1 << 32
"""Seconds."""
_SIGNALS = 65
"""How many numbers of signals Linux knows."""


def run_flush(shell: Shell, arguments: Sequence[str]) -> None:
    shell.backend.flush()


def run_truncate(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _TRUNCATE)
    mode = given.value("m", "off")
    if mode not in {known.value for known in Preallocation}:
        raise UsageError(f"Invalid preallocation mode '{mode}'")
    if not given.operands:
        raise WrongArguments
    size = number(given.operands[0])
    shell.backend.truncate(size, Preallocation(mode), exact=True)


def run_sleep(shell: Shell, arguments: Sequence[str]) -> None:
    import time

    milliseconds = c_integer(arguments[0])
    if milliseconds is None or milliseconds < 0:
        raise CommandFailed(f"{arguments[0]} is not a valid number")
    time.sleep(min(milliseconds / 1000, _LONGEST_SLEEP))


def run_abort(shell: Shell, arguments: Sequence[str]) -> None:
    """What has been said and not yet written is lost, as in any crash."""
    os.abort()


def run_sigraise(shell: Shell, arguments: Sequence[str]) -> None:
    import signal

    wanted = number(arguments[0])
    if wanted > _SIGNALS:
        raise CommandFailed(
            f"signal argument '{arguments[0]}' is too large to be a valid signal"
        )
    sys.stdout.flush()
    # Numbers that are no signals do nothing.
    with contextlib.suppress(ValueError, OSError):
        if wanted == signal.SIGINT:
            signal.signal(wanted, signal.SIG_DFL)
        signal.raise_signal(wanted)


def run_quit(shell: Shell, arguments: Sequence[str]) -> None:
    raise Quit
