"""break, wait_break, resume, remove_break: requests stopped on their way by a blkdebug node."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from lamina.errors import ImageUnsupported, LaminaError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.io.commands import CommandFailed

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.tools.io.shell import Shell

_PATIENCE = 0.05
"""Seconds between two looks at whether anybody could still be suspended."""


def debug_node(node: Node) -> Any:
    """The first node on the way down to the storage that can suspend requests; None if none can."""
    below: Node | None = node
    while below is not None and not hasattr(below, "set_breakpoint"):
        below = below.child("file") or below.child("image")
    return below


def _required(shell: Shell) -> Any:
    node = debug_node(shell.backend.node)
    if node is None:
        raise ImageUnsupported("Operation not supported")
    return node


def run_break(shell: Shell, arguments: Sequence[str]) -> None:
    event, tag = arguments
    try:
        _required(shell).set_breakpoint(event, tag)
    except LaminaError as error:
        raise CommandFailed(f"Could not set breakpoint: {os.strerror(error.errno)}") from None


def run_remove_break(shell: Shell, arguments: Sequence[str]) -> None:
    tag = arguments[0]
    try:
        _required(shell).remove_breakpoint(tag)
    except LaminaError as error:
        raise CommandFailed(
            f"Could not remove breakpoint {tag}: {os.strerror(error.errno)}"
        ) from None


def run_resume(shell: Shell, arguments: Sequence[str]) -> None:
    try:
        _required(shell).resume(arguments[0])
    except LaminaError as error:
        raise CommandFailed(f"Could not resume request: {os.strerror(error.errno)}") from None


def run_wait_break(shell: Shell, arguments: Sequence[str]) -> None:
    """QEMU waits forever for what cannot happen: where no request is in flight, we do not."""
    tag = arguments[0]
    node = debug_node(shell.backend.node)
    while node is not None:
        hopeless = shell.in_flight is None or shell.in_flight.idle
        if node.wait_suspended(tag, _PATIENCE):
            return
        if hopeless:
            break
    text = os.strerror(errno.ENOTSUP if node is None else errno.ENOENT)
    raise CommandFailed(f"Could not wait for breakpoint {tag}: {text}")
