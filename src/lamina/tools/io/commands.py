"""The table of commands: what each is called with, where it lives, how it may fail."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lamina.tools.io.shell import Shell


class CommandFailed(Exception):
    """A command did not do what was asked. The message, if any, goes to standard output."""


class WrongArguments(CommandFailed):
    """The options of a command are fine, but not what follows them: the synopsis says it all."""


@dataclass(frozen=True)
class Command:
    synopsis: str
    """What follows the name."""
    purpose: str
    home: str
    """The module of this package that has the function ``run_NAME(shell, arguments)``."""
    minimum: int = 0
    """Fewest arguments, options counted as well."""
    maximum: int | None = 0
    """Most arguments; None: any number."""
    needs_image: bool = True
    writes: bool = False
    """Refused where the image is open for reading only."""
    alias: str = ""

    def line(self, name: str) -> str:
        """The synopsis and the purpose, under the name that the user called it by."""
        called = f"{name} {self.synopsis}" if self.synopsis else name
        return f"{called} -- {self.purpose}"

    def complaint(self, name: str, count: int) -> str | None:
        """What is wrong with calling it with so many arguments."""
        if count >= self.minimum and (self.maximum is None or count <= self.maximum):
            return None
        if self.maximum is None:
            expected = f"at least {self.minimum}"
        elif self.minimum == self.maximum:
            expected = str(self.minimum)
        else:
            expected = f"between {self.minimum} and {self.maximum}"
        return f"bad argument count {count} to {name}, expected {expected} arguments"


COMMANDS = {
    "abort": Command("", "crash on purpose, by SIGABRT", "control", needs_image=False),
    "aio_flush": Command("", "wait for all requests of aio_read and aio_write", "aio"),
    "aio_read": Command(
        "[-Ciqrv] [-P pattern] off len [len..]", "start reading, and do not wait for it",
        "aio", 2, None,
    ),
    "aio_write": Command(
        "[-Cfiqruz] [-P pattern] off len [len..]", "start writing, and do not wait for it",
        "aio", 2, None, writes=True,
    ),
    "alloc": Command(
        "offset [count]", "tell how much of a range this image holds itself",
        "status", 1, 2, alias="a",
    ),
    "break": Command(
        "event tag", "have the next request suspended that reaches the event", "breakpoints", 2, 2
    ),
    "close": Command("", "close the image", "files", alias="c"),
    "discard": Command(
        "[-Cq] off len", "say that a range is no longer needed",
        "readwrite", 2, None, writes=True, alias="d",
    ),
    "flush": Command("", "make everything written so far durable", "control", alias="f"),
    "help": Command(
        "[command]", "explain one command, or list them all",
        "manual", 0, 1, needs_image=False, alias="?",
    ),
    "info": Command("", "show what is known about the image", "status", alias="i"),
    "length": Command("", "show the size of the disk", "status", alias="l"),
    "map": Command("", "show which ranges this image holds itself", "status"),
    "open": Command(
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open an image",
        "files", 1, None, needs_image=False, alias="o",
    ),
    "quit": Command("", "leave", "control", 0, None, needs_image=False, alias="q"),
    "read": Command(
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len", "read a range",
        "readwrite", 2, None, alias="r",
    ),
    "readv": Command(
        "[-Cqrv] [-P pattern] off len [len..]", "read a range into several buffers",
        "readwrite", 2, None,
    ),
    "remove_break": Command(
        "tag", "remove a breakpoint, and resume what it has suspended", "breakpoints", 1, 1
    ),
    "reopen": Command(
        "[(-r|-w)] [-c cache] [-o options]", "change how the image is open", "files", 0, None
    ),
    "resume": Command("tag", "let a suspended request go on", "breakpoints", 1, 1),
    "sigraise": Command(
        "signal", "send a signal to this process", "control", 1, 1, needs_image=False
    ),
    "sleep": Command("", "wait for so many milliseconds", "control", 1, 1, needs_image=False),
    "truncate": Command(
        "[-m prealloc_mode] off", "change the size of the disk",
        "control", 1, 3, writes=True, alias="t",
    ),
    "wait_break": Command("tag", "wait until a request is suspended", "breakpoints", 1, 1),
    "write": Command(
        "[-bcCfnqruz] [-P pattern | -s source_file] off len", "write a range",
        "readwrite", 2, None, writes=True, alias="w",
    ),
    "writev": Command(
        "[-Cfqr] [-P pattern] off len [len..]", "write a range from several buffers",
        "readwrite", 2, None, writes=True,
    ),
    "zone_append": Command(
        "offset len [len..]", "write behind what a zone holds", "zones", 3, 4, alias="zap"
    ),
    "zone_close": Command("offset len", "close zones", "zones", 2, 2, alias="zc"),
    "zone_finish": Command("offset len", "make zones full", "zones", 2, 2, alias="zf"),
    "zone_open": Command("offset len", "open zones", "zones", 2, 2, alias="zo"),
    "zone_report": Command(
        "offset number", "show the zones of a zoned device", "zones", 2, 2, alias="zrp"
    ),
    "zone_reset": Command("offset len", "make zones empty", "zones", 2, 2, alias="zrs"),
}

_ALIASES = {command.alias: name for name, command in COMMANDS.items() if command.alias}


def find(name: str) -> tuple[str, Command] | None:
    """The full name of a command, and what is known about it."""
    full = _ALIASES.get(name, name)
    command = COMMANDS.get(full)
    return None if command is None else (full, command)


def load(name: str, command: Command) -> Callable[[Shell, Sequence[str]], None]:
    module = __import__(f"lamina.tools.io.{command.home}", fromlist=["*"])
    function: Callable[[Shell, Sequence[str]], None] = getattr(module, f"run_{name}")
    return function
