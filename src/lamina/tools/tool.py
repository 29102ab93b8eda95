"""What the command-line tools share: a name, messages, exit codes, one place for all endings."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence

from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, NoReturn
from lamina.tools.arguments import GetoptError, WrongUsage

if TYPE_CHECKING:
    from lamina.block.session import Session

EXIT_OK = 0
EXIT_FAILURE = 1

_GARBAGE_THRESHOLD = 50_000
"""New objects after which Python looks for garbage; 700 by default."""


class Exit(Exception):
    """End the tool with this exit code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Tool:
    """One run of a tool.

    ``name`` is what it was called by, so that a link named ``qemu-img`` speaks as ``qemu-img``;
    ``command`` the subcommand being served, if any.
    """

    def __init__(self, called_as: str) -> None:
        self.name = os.path.basename(called_as).removesuffix(".exe").removesuffix(".py")
        self.command = ""
        self._session: Session | None = None

    @property
    def full_name(self) -> str:
        """As the C library shows it in its messages: ``qemu-img info``."""
        return f"{self.name} {self.command}" if self.command else self.name

    @property
    def session(self) -> Session:
        """Secrets and named nodes of this run."""
        if self._session is None:
            from lamina.block.session import Session

            self._session = Session(warn=self.tell)
        return self._session

    # -- messages --------------------------------------------------------------------------------

    def error(self, message: str | LaminaError, *, prefix: str = "") -> None:
        """``qemu-img: prefix message``, then the hint of the error on lines of its own."""
        hint = message.hint if isinstance(message, LaminaError) else None
        self._say(f"{self.name}: {prefix}{message}")
        if hint:
            self._say(hint)

    def warn(self, text: str) -> None:
        """``qemu-img: warning: text``; ``text`` with or without the word in front."""
        self.tell(text if text.startswith("warning:") else f"warning: {text}")

    def tell(self, text: str) -> None:
        """What is said further down (``Session.warn``): findings about an image stand alone, what
        begins with ``warning: `` or ``error: `` is a message of the tool."""
        if text.startswith("error: "):
            self._say(f"{self.name}: {text.removeprefix('error: ')}")
        elif text.startswith("warning:"):
            self._say(f"{self.name}: {text}")
        else:
            self._say(text)

    def hint(self, text: str) -> None:
        """A further line that belongs to the message before."""
        self._say(text)

    def fail(self, message: str | LaminaError, code: int = EXIT_FAILURE) -> NoReturn:
        self.error(message)
        raise Exit(code)

    def _say(self, text: str) -> None:
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()

    # -- the whole run ---------------------------------------------------------------------------

    def run(
        self, work: Callable[[list[str], Tool], int], arguments: Sequence[str]
    ) -> int:
        """The exit code of ``work(arguments, tool)``, whichever way it ends; never a traceback."""
        for stream in (sys.stdout, sys.stderr):
            # File names are bytes: those that are no text pass through unharmed.
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="surrogateescape")
        try:
            code = self._guarded(work, list(arguments))
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has seen enough; nor can the interpreter flush at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_FAILURE
        return code

    def _guarded(self, work: Callable[[list[str], Tool], int], arguments: list[str]) -> int:
        try:
            return work(arguments, self)
        except Exit as end:
            return end.code
        except (GetoptError, WrongUsage) as error:
            speaker = self.full_name if isinstance(error, GetoptError) else self.name
            self._say(f"{speaker}: {error}")
            self._say(error.hint or f"Try '{self.full_name} --help' for more info")
        except LaminaError as error:
            self.error(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.error(error.strerror or str(error))
        except MemoryError:
            self.error("Cannot allocate memory")
        except KeyboardInterrupt:
            _die_of_interrupt()
        return EXIT_FAILURE


def run_and_leave(work: Callable[[list[str], Tool], int]) -> NoReturn:
    """What a console script calls: the whole life of the process.

    Small images are inspected faster than an interpreter takes itself apart, so it is not asked to;
    nor does it look for garbage while it starts, when there is none.
    """
    gc.set_threshold(_GARBAGE_THRESHOLD)
    # numpy is there for tables, not for matrices: its pool of threads would take longer to start
    # than many a command takes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = Tool(sys.argv[0]).run(work, sys.argv[1:])
    os._exit(code)


def _die_of_interrupt() -> NoReturn:
    """End as a process that an interrupt killed, so that a shell stops its loop as well."""
    import signal

    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    raise Exit(130)
