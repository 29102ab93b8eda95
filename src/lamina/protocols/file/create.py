"""Making a new file, or emptying an old one that nobody uses."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable

from lamina.block.limits import Preallocation
from lamina.block.permissions import Perm
from lamina.block.session import log_warning
from lamina.errors import StorageError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.protocols.file import allocation, locks

if TYPE_CHECKING:
    from lamina.protocols.file import FileCreateOptions

DEFAULT_EXTENT_SIZE_HINT = 1 << 20
_FIRST_BLOCK = 4096

# Of linux/fs.h.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x00000800


def create_file(
    path: str, options: FileCreateOptions, warn: Callable[[str], None] = log_warning
) -> None:
    """An empty file of ``options.size`` bytes. Raises Busy, UsageError or StorageError.

    An existing file is locked before it is emptied: one in use stays as it is.
    """
    try:
        preallocation = Preallocation(options.preallocation)
    except ValueError:
        raise UsageError(f"invalid parameter value: {options.preallocation}") from None
    fd = _open(path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"'file' driver requires '{path}' to be a regular file", path=path)
        if locks.available("auto"):
            locks.FileLocks(fd, path).apply(Perm.WRITE | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)
        os.ftruncate(fd, 0)
        if options.nocow:
            _switch_off_copy_on_write(fd)
        _hint_extent_size(fd, options.extent_size_hint, warn)
        allocation.set_length(fd, 0, options.size, preallocation)
        if preallocation is Preallocation.OFF:
            _allocate_first_block(fd, options.size)
    except OSError as error:
        raise StorageError(
            f"Could not create '{path}': {os.strerror(error.errno or errno.EIO)}",
            errno=error.errno,
            path=path,
        ) from None
    finally:
        os.close(fd)


def _open(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        number = error.errno or errno.EIO
        raise StorageError(
            f"Could not create '{path}': {os.strerror(number)}", errno=number, path=path
        ) from None
    except ValueError:  # a NUL byte in the name
        raise UsageError(f"Could not create '{path}': Invalid argument", path=path) from None


def _allocate_first_block(fd: int, size: int) -> None:
    """Probing what O_DIRECT needs reads the first block: an unwritten one would tell nothing."""
    length = min(size, _FIRST_BLOCK)
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        if length:
            os.write(fd, bytes(length))
    except OSError:
        pass


def _switch_off_copy_on_write(fd: int) -> None:
    """Only btrfs heeds it; elsewhere nothing is lost."""
    if sys.platform != "linux":
        return
    import fcntl
    import struct

    try:
        flags = struct.unpack("@l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)))[0]
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("@l", flags | _FS_NOCOW_FL))
    except OSError:
        pass


def _hint_extent_size(fd: int, hint: int | None, warn: Callable[[str], None]) -> None:
    """Ask (XFS) for extents of this size; a warning if the user asked and it fails."""
    size = DEFAULT_EXTENT_SIZE_HINT if hint is None else hint
    if not size or sys.platform != "linux":
        return
    import fcntl
    import struct

    # struct fsxattr: xflags, extsize, nextents, projid, cowextsize, 8 bytes of padding.
    layout = struct.Struct("@IIIII8x")
    try:
        xflags, _, *others = layout.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28)))
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, layout.pack(xflags | _FS_XFLAG_EXTSIZE, size, *others))
    except OSError as error:
        if hint is not None:
            reason = os.strerror(error.errno or errno.EIO)
            warn(f"warning: Failed to set extent size hint: {reason}")
