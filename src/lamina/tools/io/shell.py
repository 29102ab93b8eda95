"""The loop that reads commands and executes them, and what the commands share."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable

from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, TextIO
from lamina.tools.arguments import GetoptError
from lamina.tools.io import commands
from lamina.tools.io.commands import CommandFailed, WrongArguments

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node
    from lamina.tools.io.aio import InFlight
    from lamina.tools.tool import Tool

PROMPT = "qemu-io> "
"""Scripts wait for exactly this, whatever the tool is called."""
_PATIENCE = 0.05
"""Seconds to wait for requests in flight before looking whether they are suspended."""


class Quit(Exception):
    """Leave, as the command ``quit`` says."""


class Shell:
    """One run: the open image, requests in flight, whether anything has failed."""

    def __init__(self, tool: Tool, *, misalign: bool = False) -> None:
        self.tool = tool
        self.misalign = misalign
        self.failed = False
        self.copies_on_read = False
        self.image: Backend | None = None
        self.in_flight: InFlight | None = None
        """Made by the first asynchronous request."""

    @property
    def backend(self) -> Backend:
        """The open image. Commands that need one are not called without."""
        assert self.image is not None
        return self.image

    @property
    def node(self) -> Node:
        """The image as the user named it, below the filter that -C has put on top."""
        node = self.backend.node
        return node.file if self.copies_on_read else node

    # -- talking ---------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Whole lines for standard output."""
        if self.in_flight is not None:
            self.in_flight.report()
        sys.stdout.write(text)

    def complain(self, line: str) -> None:
        """A line for standard error that does not name the tool."""
        self.tool.hint(line)

    # -- executing -------------------------------------------------------------------------------

    def run_commands(self, lines: Iterable[str]) -> None:
        try:
            for line in lines:
                self.execute(line)
        except Quit:
            pass

    def converse(self, source: TextIO) -> None:
        """Execute line by line what ``source`` says, until it ends or says ``quit``."""
        ask: Callable[[TextIO], str] = self._ask
        if source.isatty():
            from lamina.tools.io import terminal

            ask = terminal.ask
        try:
            while line := ask(source):
                self.execute(line)
        except Quit:
            pass

    def _ask(self, source: TextIO) -> str:
        """The next line, with its end; nothing at the end of ``source``."""
        sys.stdout.write(PROMPT)
        sys.stdout.flush()
        if self.in_flight is None:
            return source.readline()
        with self.in_flight.reporting_at_once():
            return source.readline()

    def execute(self, line: str) -> None:
        """One command. Raises Quit; everything else that goes wrong is said and remembered."""
        # As in C, a line ends at its first zero byte.
        words = [word for word in line.rstrip("\n").partition("\0")[0].split(" ") if word]
        if not words:
            return
        name, *arguments = words
        found = commands.find(name)
        if found is None:
            self._fail(f'command "{name}" not found')
            return
        full, command = found
        if command.needs_image and self.image is None:
            self._fail("no file open, try 'help open'")
            return
        complaint = command.complaint(name, len(arguments))
        if complaint is not None:
            self._fail(complaint)
            return
        if command.writes and self.backend.read_only:
            self.failed = True
            self.tool.error("Block node is read-only")
            return
        try:
            commands.load(full, command)(self, arguments)
        except CommandFailed as failure:
            self.failed = True
            text = str(failure)
            if isinstance(failure, WrongArguments):
                text = command.line(name)
            if text:
                self.say(text + "\n")
        except GetoptError as error:
            self._fail(f"{name}: {error}")
            self.say(command.line(name) + "\n")
        except LaminaError as error:
            self.failed = True
            self.tool.error(error)
        except MemoryError:
            self.failed = True
            self.say(f"{name} failed: {os.strerror(errno.ENOMEM)}\n")
        if self.in_flight is not None:
            self.in_flight.report()

    def _fail(self, line: str) -> None:
        self.failed = True
        self.complain(line)

    # -- the end ---------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until no request is in flight any more; their reports are printed."""
        if self.in_flight is not None:
            self.in_flight.wait()

    def close(self) -> None:
        """Close the image, if one is open, once no request is in flight any more."""
        image, self.image = self.image, None
        if image is None:
            return
        if self.in_flight is not None:
            from lamina.tools.io.breakpoints import debug_node

            # Nobody could resume what is suspended now.
            while not self.in_flight.wait(_PATIENCE):
                node = debug_node(image.node)
                if node is not None:
                    node.resume_all()
        image.close()
