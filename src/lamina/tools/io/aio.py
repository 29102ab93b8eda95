"""aio_read, aio_write, aio_flush: requests that go on while further commands are executed.

Each has a thread of its own. Its report is printed between commands, or at once while the shell
waits for the next one, so that no report comes amidst the output of a command.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import Parsed, parse
from lamina.tools.io.commands import CommandFailed, WrongArguments
from lamina.tools.io.numbers import number, total_length
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

_READ = (*switches("Ciqrv"), PATTERN)
_WRITE = (*switches("Cfiqruz"), PATTERN)


class InFlight:
    """Requests that have been started, and reports that have not been printed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._reports: list[str] = []
        self._at_once = False

    def start(self, request: Callable[[], str]) -> None:
        """Run ``request`` on a thread; what it returns is its report."""
        with self._changed:
            self._running += 1
        threading.Thread(target=self._run, args=(request,)).start()

    def _run(self, request: Callable[[], str]) -> None:
        report = ""
        try:
            report = request()
        except CommandFailed as failure:
            report = f"{failure}\n"
        finally:
            with self._changed:
                self._running -= 1
                self._reports.append(report)
                if self._at_once:
                    # Whoever does not listen any more is met by the next command as well.
                    with suppress(OSError):
                        self._print()
                        sys.stdout.flush()
                self._changed.notify_all()

    def report(self) -> None:
        """Print what has finished, in that order."""
        with self._changed:
            self._print()

    def _print(self) -> None:
        sys.stdout.write("".join(self._reports))
        self._reports.clear()

    @contextmanager
    def reporting_at_once(self) -> Iterator[None]:
        """Nobody else prints anything meanwhile."""
        with self._changed:
            self._print()
            self._at_once = True
        try:
            yield
        finally:
            with self._changed:
                self._at_once = False

    def wait(self, timeout: float | None = None) -> bool:
        """Until all have finished, or for so many seconds; whether all have."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._running, timeout)
            self._print()
        return done

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._running


def _in_flight(shell: Shell) -> InFlight:
    if shell.in_flight is None:
        shell.in_flight = InFlight()
    return shell.in_flight


def run_aio_read(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _READ)
    if len(given.operands) < 2:
        raise WrongArguments
    if given.flag("i"):
        _say_invalid(shell, "read")
        return
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    backend, buffer = shell.backend, new_buffer(shell, count)

    def request() -> str:
        seconds = timed("readv", lambda: backend.readv([(offset, buffer)]))
        text = mismatch(buffer, given.value("P"), offset) if given.flag("P") else ""
        return text + outcome(given, "read", offset, count, seconds, buffer)

    _in_flight(shell).start(request)


def run_aio_write(shell: Shell, arguments: Sequence[str]) -> None:
    given = parse(arguments, _WRITE)
    if len(given.operands) < 2:
        raise WrongArguments
    _refuse_contradictions(given)
    if given.flag("i"):
        _say_invalid(shell, "write")
        return
    offset = number(given.operands[0])
    backend, flags = shell.backend, write_flags(given)
    if given.flag("z"):
        count = number(given.operands[1])

        def write() -> None:
            backend.write_zeroes(offset, count, flags)
    else:
        count = total_length(given.operands[1:])
        data = filled_buffer(shell, count, given.value("P", DEFAULT_PATTERN))

        def write() -> None:
            backend.writev([(offset, data)], flags)

    def request() -> str:
        seconds = timed("aio_write", write)
        return outcome(given, "wrote", offset, count, seconds, None)

    _in_flight(shell).start(request)


def _refuse_contradictions(given: Parsed) -> None:
    if given.flag("z") and len(given.operands) != 2:
        raise CommandFailed("-z supports only a single length parameter")
    if given.flag("u") and not given.flag("z"):
        raise CommandFailed("-u requires -z to be specified")
    if given.flag("r") and given.flag("z"):
        raise CommandFailed("cannot combine zero write with registered I/O buffer")


def _say_invalid(shell: Shell, what: str) -> None:
    """A request that is counted as invalid and goes nowhere."""
    shell.say(f"injecting invalid {what} request\n")


def run_aio_flush(shell: Shell, arguments: Sequence[str]) -> None:
    shell.wait()
