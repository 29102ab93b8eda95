"""From a file name to a node."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from lamina.errors import StorageError, UsageError
from lamina.protocols.file import locks
from lamina.protocols.file.node import FileNode

if TYPE_CHECKING:
    from lamina.block.node import NodeOptions
    from lamina.protocols.file import FileOptions

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def open_file(options: FileOptions, node_options: NodeOptions) -> FileNode:
    path = options.filename
    read_only = node_options.read_only
    # A directory cannot be opened for writing: it has to be told apart before.
    if os.path.isdir(path):
        raise not_regular(path)
    try:
        fd = open_descriptor(path, read_only=read_only, direct=node_options.direct)
    except StorageError as error:
        if read_only or not node_options.auto_read_only or error.errno not in _NOT_WRITABLE:
            raise
        read_only = True
        fd = open_descriptor(path, read_only=True, direct=node_options.direct)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise not_regular(path)
        locking = locks.available(options.locking)
        if node_options.direct:
            from lamina.protocols.file.direct import DirectFileNode

            node: FileNode = DirectFileNode(node_options, fd, path, locking=locking)
        else:
            node = FileNode(node_options, fd, path, locking=locking)
    except BaseException:
        os.close(fd)
        raise
    node.read_only = read_only
    return node


def open_descriptor(path: str, *, read_only: bool, direct: bool = False, flags: int = 0) -> int:
    """Raises StorageError with the sentence that names the file."""
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if direct:
        flags |= getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        number = error.errno or errno.EIO
        reason = os.strerror(number)
        if direct and number == errno.EINVAL:
            reason = "filesystem does not support O_DIRECT"
        raise StorageError(f"Could not open '{path}': {reason}", errno=number, path=path) from None
    except ValueError:  # a NUL byte in the name
        raise UsageError(f"Could not open '{path}': Invalid argument", path=path) from None


def not_regular(path: str) -> UsageError:
    return UsageError(f"'file' driver requires '{path}' to be a regular file", path=path)
