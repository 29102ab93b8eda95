"""How far the work has come: the percentages of ``-p``, a bar for people, an answer to SIGUSR1."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

from lamina.hints import Any

_STEP = 0.01
"""The part of the work after which a new figure is worth a line."""
_BAR = 30
_BAR_DELAY = 0.5
"""Seconds before the bar appears: short work needs none."""


class Progress:
    """``with Progress(...) as progress: … progress(0.5) …``. Callable by any thread.

    With ``wanted`` (-p): percentages on standard output, as scripts expect them. Else, unless
    ``quiet``, and where standard error is a terminal: a bar there. At SIGUSR1: one line on
    standard error.
    """

    def __init__(self, wanted: bool = False, *, quiet: bool = False) -> None:
        self._wanted = wanted and not quiet
        self._bar = not wanted and not quiet and sys.stderr.isatty()
        self._bar_shown = False
        self._stopped = False
        self._done = 0.0
        self._shown = -1.0
        self._started = time.monotonic()
        self._old_handler: Any = None

    def __enter__(self) -> Progress:
        if hasattr(signal, "SIGUSR1"):
            try:
                self._old_handler = signal.signal(signal.SIGUSR1, self._answer)
            except ValueError:  # not the main thread: nobody can signal us
                self._old_handler = None
        self(0.0)
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGUSR1, self._old_handler)
        if self._bar_shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        if self._wanted:
            if not failed and not self._stopped:
                self._done = 1.0
                self._percentage()
            sys.stdout.write("\n")
            sys.stdout.flush()

    def __call__(self, done: float) -> None:
        """``done`` is the part of the work done, from 0 to 1."""
        self._done = done
        if done - self._shown < _STEP and not (done >= 1.0 > self._shown):
            return
        if self._wanted:
            self._shown = done
            self._percentage()
        elif self._bar and time.monotonic() - self._started > _BAR_DELAY:
            self._shown = done
            self._bar_shown = True
            full = round(done * _BAR)
            bar = "#" * full + "." * (_BAR - full)
            sys.stderr.write(f"\r{done:4.0%} [{bar}] {time.monotonic() - self._started:.0f} s")
            sys.stderr.flush()

    def stop(self) -> None:
        """Show no further figures: something else has been said about the end."""
        self._stopped = True

    def _percentage(self) -> None:
        sys.stdout.write(f"    ({self._done * 100:.2f}/100%)\r")
        sys.stdout.flush()

    def _answer(self, _signal: int, _frame: FrameType | None) -> None:
        sys.stderr.write(f"    ({self._done * 100:.2f}/100%)\n")
        sys.stderr.flush()
