"""The process: going to the background, the file with its number, and the signals that end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from lamina.errors import StorageError
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK, Exit

_READY = b"+"


class Daemon:
    """Make it before there are threads. With ``fork`` only the child comes back from making it; the
    parent ends when the child is ``ready``, or as the child ends."""

    def __init__(self, *, fork: bool, pid_file: str | None, talkative: bool = False) -> None:
        """``talkative``: messages go on after the parent has ended."""
        self._pid_file = pid_file
        self._talkative = talkative
        self._told = -1
        """Where the parent waits for a byte."""
        self._stop = threading.Event()
        if fork:
            self._fork()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _fork(self) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            if os.read(reading, 1) == _READY:
                raise Exit(EXIT_OK)
            _, status = os.waitpid(child, 0)
            raise Exit(os.waitstatus_to_exitcode(status) or EXIT_FAILURE)
        os.close(reading)
        os.setsid()
        self._told = writing

    def ready(self) -> None:
        """The server serves. Raises StorageError for a file that cannot be written."""
        if self._pid_file is not None:
            self._write_pid_file(self._pid_file)
        if self._told >= 0:
            os.chdir("/")
            nowhere = os.open(os.devnull, os.O_RDWR)
            sys.stdout.flush()
            sys.stderr.flush()
            for standard in (0, 1) if self._talkative else (0, 1, 2):
                os.dup2(nowhere, standard)
            os.close(nowhere)
            os.write(self._told, _READY)
            os.close(self._told)
            self._told = -1

    def _write_pid_file(self, path: str) -> None:
        """The file stays open, and locked, for as long as the process lives: a second server cannot
        take it. It stays behind at the end, as qemu-nbd's does: whoever started the server removes
        it, and would stumble if it went away by itself."""
        import fcntl

        doing = f"Could not create '{path}'"
        try:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            doing = "Cannot lock pid file"
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doing = "Failed to truncate pid file"
            os.ftruncate(fd, 0)
            doing = "Failed to write pid file"
            os.write(fd, b"%d\n" % os.getpid())
        except OSError as error:
            raise StorageError(f"{doing}: {error.strerror}", errno=error.errno) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """From any thread: ``wait`` returns."""
        self._stop.set()

    def wait(self) -> None:
        self._stop.wait()
