"""The kernel's own client (Linux): a disk as ``/dev/nbdX``."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from lamina.errors import StorageError, UsageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.exports.nbd import Export, Server

_SET_SOCK = 0xAB00
_SET_BLKSIZE = 0xAB01
_DO_IT = 0xAB03
_CLEAR_SOCK = 0xAB04
_CLEAR_QUE = 0xAB05
_SET_SIZE_BLOCKS = 0xAB07
_DISCONNECT = 0xAB08
_SET_FLAGS = 0xAB0A
_BLOCK = 512


@contextmanager
def attach(
    device: str, server: Server, export: Export, ended: Callable[[], None]
) -> Iterator[None]:
    """Serve ``export`` to the kernel as long as the block lasts; ``ended``: it has let go."""
    from lamina.protocols.nbd.connecting import shake_hands

    try:
        fd = os.open(device, os.O_RDWR)
    except OSError as error:
        raise StorageError(
            f"Failed to open {device}: {error.strerror}", errno=error.errno
        ) from None
    ours, theirs = socket.socketpair()
    try:
        server.serve(ours)
        flags = shake_hands(theirs, export.name)
        _set_up(fd, theirs, export.size, flags)
        thread = threading.Thread(target=_do_it, args=(fd, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.ioctl(fd, _DISCONNECT)
            thread.join()
    finally:
        theirs.close()
        os.close(fd)


def _set_up(fd: int, connection: socket.socket, size: int, flags: int) -> None:
    steps = (
        (_CLEAR_SOCK, 0),
        (_SET_SOCK, connection.fileno()),
        (_SET_BLKSIZE, _BLOCK),
        (_SET_SIZE_BLOCKS, size // _BLOCK),
        (_SET_FLAGS, flags),
    )
    try:
        for request, argument in steps:
            fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise StorageError(
            f"Failed to set NBD socket: {error.strerror}", errno=error.errno
        ) from None


def _do_it(fd: int, ended: Callable[[], None]) -> None:
    """The kernel takes over, for as long as the device is in use."""
    with suppress(OSError):  # EPIPE: the connection was ended
        fcntl.ioctl(fd, _DO_IT)
    for request in (_CLEAR_QUE, _CLEAR_SOCK):
        with suppress(OSError):
            fcntl.ioctl(fd, request)
    ended()


def disconnect(device: str) -> None:
    """Have whatever serves ``device`` let go of it. Raises UsageError."""
    try:
        fd = os.open(device, os.O_RDWR)
    except OSError as error:
        raise UsageError(f"Cannot open {device}: {error.strerror}") from None
    try:
        for request in (_CLEAR_QUE, _DISCONNECT, _CLEAR_SOCK):
            with suppress(OSError):
                fcntl.ioctl(fd, request)
    finally:
        os.close(fd)
