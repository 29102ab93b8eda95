"""From a file name to a descriptor, and to a node."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable

from lamina.errors import StorageError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.protocols.file import locks
from lamina.protocols.file.node import FileNode

if TYPE_CHECKING:
    from lamina.block.node import NodeOptions
    from lamina.protocols.file import FileOptions


def open_file(options: FileOptions, node_options: NodeOptions) -> FileNode:
    """Raises UsageError for what is no regular file, StorageError where the host refuses."""
    path = options.filename
    fd, read_only = open_checked(path, node_options, _check_regular)
    try:
        locking = locks.available(options.locking)
        if node_options.direct and hasattr(os, "O_DIRECT"):
            from lamina.protocols.file.direct import DirectFileNode

            node: FileNode = DirectFileNode(node_options, fd, path, locking=locking)
        else:
            node = FileNode(node_options, fd, path, locking=locking)
    except BaseException:
        os.close(fd)
        raise
    node.read_only = read_only
    return node


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UsageError(f"'file' driver requires '{path}' to be a regular file", path=path)


def open_checked(
    path: str, node_options: NodeOptions, check: Callable[[str, int], None], *, flags: int = 0
) -> tuple[int, bool]:
    """A descriptor, and whether it is for reading only.

    ``check`` raises for a kind of file (``st_mode``) that the caller does not serve.
    """
    # With auto-read-only, writing has to wait until somebody wants to (``FileNode``).
    read_only = node_options.read_only or node_options.auto_read_only
    mode = _mode(path) if read_only else None
    if mode is not None:
        check(path, mode)  # before a pipe makes us wait for its other end
    fd = open_descriptor(path, read_only=read_only, direct=node_options.direct, flags=flags)
    try:
        check(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd, read_only


def _mode(path: str) -> int | None:
    """None: there is nothing, or nothing that can be asked; opening will tell why."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return None


def open_descriptor(path: str, *, read_only: bool, direct: bool = False, flags: int = 0) -> int:
    """Raises StorageError with a sentence that names the file."""
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    flags |= getattr(os, "O_BINARY", 0)
    if direct:
        flags |= getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        number = error.errno or errno.EIO
        reason = os.strerror(number)
        if direct and number == errno.EINVAL:
            reason = "filesystem does not support O_DIRECT"
        raise StorageError(f"Could not open '{path}': {reason}", errno=number, path=path) from None
    except ValueError:  # a NUL byte in the name
        raise UsageError(f"Could not open '{path}': Invalid argument", path=path) from None
    try:
        if direct and sys.platform == "darwin":
            _bypass_cache(fd)
        if not read_only:
            _check_writable_device(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _bypass_cache(fd: int) -> None:
    """macOS: what O_DIRECT is elsewhere, but with any alignment. Raises StorageError."""
    import fcntl

    try:
        fcntl.fcntl(fd, 48, 1)  # F_NOCACHE
    except OSError as error:
        raise StorageError.from_os_error(error) from None


def _check_writable_device(fd: int, path: str) -> None:
    """Linux lets a device be opened for writing that is not writable. Raises StorageError."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return
    from lamina.protocols.file.device import is_read_only

    if is_read_only(fd):
        raise StorageError(
            f"The device is not writable: {os.strerror(errno.EACCES)}",
            errno=errno.EACCES,
            path=path,
        )
