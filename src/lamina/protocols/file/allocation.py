"""Space of a file: punching holes, zeroing, preallocating, growing and shrinking."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lamina.block.limits import Preallocation
from lamina.errors import StorageError, UsageError
from lamina.hints import Any

# Of linux/falloc.h.
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
_LONGEST = (1 << 63) - 1
"""Bytes: what the host can express."""
_SHORT = 1 << 20
"""Bytes that may be written one block after the other, as posix_fallocate(3) does where the file
system has no other way. Other ways to allocate need ctypes, which takes long to import."""
_FULL_BLOCK = 64 << 10
"""Bytes that preallocation=full writes at a time."""


def zero(fd: int, offset: int, length: int, *, may_unmap: bool) -> bool:
    """Make the range read as zeroes without writing them; False: this file system cannot.

    Grows the file where the range goes beyond its end. Without ``may_unmap`` the space stays
    (or becomes) allocated. Raises OSError.
    """
    file_length = os.fstat(fd).st_size
    if offset >= file_length:
        # Behind the end there is nothing to zero, only to be there.
        return _extend(fd, offset, length, allocated=not may_unmap)
    if may_unmap and punch(fd, offset, length):
        if offset + length > file_length:
            os.ftruncate(fd, offset + length)
        return True
    if _fallocate(fd, ZERO_RANGE, offset, length):
        return True
    return not may_unmap and punch(fd, offset, length) and _fallocate(fd, 0, offset, length)


def _extend(fd: int, offset: int, length: int, *, allocated: bool) -> bool:
    check_range(offset, length)
    if not allocated:
        os.ftruncate(fd, offset + length)
        return True
    if length > _SHORT or not hasattr(os, "posix_fallocate"):
        return _fallocate(fd, 0, offset, length)
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def punch(fd: int, offset: int, length: int) -> bool:
    """Give the space back; the range reads as zeroes. False: not supported. Raises OSError."""
    if sys.platform == "darwin":
        return _punch_on_macos(fd, offset, length)
    try:
        return _fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _warn_of_misbehaviour()
        return False


@functools.cache
def _warn_of_misbehaviour() -> None:
    from lamina.block.session import log_warning

    log_warning(
        "Your file system is misbehaving: fallocate(FALLOC_FL_PUNCH_HOLE) returned EINVAL. "
        "Please report this bug to your file system vendor."
    )


def _punch_on_macos(fd: int, offset: int, length: int) -> bool:
    import fcntl
    import struct

    check_range(offset, length)
    try:
        # F_PUNCHHOLE takes struct fpunchhole: flags, reserved, offset, length.
        fcntl.fcntl(fd, 99, struct.pack("@IIqq", 0, 0, offset, length))
    except OSError as error:
        if error.errno in (*UNSUPPORTED, errno.EINVAL):
            return False
        raise
    return True


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2); False: not supported for this file or mode. Raises OSError or OverflowError."""
    check_range(offset, length)
    call = _fallocate_function()
    if call is None:
        return False
    while call(fd, mode, offset, length) != 0:
        import ctypes

        number = ctypes.get_errno()
        if number in UNSUPPORTED:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def check_range(offset: int, length: int) -> None:
    """Numbers on their way to C are cut to 64 bits without a word. Raises OverflowError."""
    if offset < 0 or length < 0 or offset + length > _LONGEST:
        raise OverflowError


@functools.cache
def _fallocate_function() -> Any:
    """Linux's fallocate, which the os module lacks; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    # The 64-bit variant is the only one that takes large offsets on 32-bit hosts.
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def set_length(fd: int, old: int, new: int, preallocation: Preallocation) -> None:
    """Grow or shrink; a preallocation that fails leaves the old length.

    Raises UsageError or StorageError.
    """
    if preallocation is Preallocation.METADATA:
        raise UsageError("Unsupported preallocation mode: metadata")
    if preallocation is not Preallocation.OFF and new < old:
        raise UsageError("Cannot use preallocation for shrinking files")
    try:
        if new > _LONGEST:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if preallocation is Preallocation.OFF or new == old:
            os.ftruncate(fd, new)
        elif preallocation is Preallocation.FALLOC:
            _allocate(fd, old, new)
        else:
            _write_zeroes(fd, old, new)
    except OSError as error:
        if preallocation is not Preallocation.OFF:
            os.ftruncate(fd, old)
        raise _named(error, preallocation) from None


def _allocate(fd: int, old: int, new: int) -> None:
    if sys.platform == "win32" or sys.platform == "darwin":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    os.posix_fallocate(fd, old, new - old)


def _write_zeroes(fd: int, old: int, new: int) -> None:
    from lamina.protocols.file.transfer import continue_write

    # The length first: a file system that cannot hold so long a file says so before all the work.
    os.ftruncate(fd, new)
    block = bytes(_FULL_BLOCK)
    with _buffered(fd):
        for start in range(old, new, _FULL_BLOCK):
            continue_write(fd, (memoryview(block)[: new - start],), start, 0)
    os.fsync(fd)


@contextmanager
def _buffered(fd: int) -> Iterator[None]:
    """Without O_DIRECT for a while: a file need not end where a block does."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        yield
        return
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _named(error: OSError, preallocation: Preallocation) -> StorageError:
    what = {
        Preallocation.OFF: "Could not resize file",
        Preallocation.FALLOC: "Could not preallocate new data",
        Preallocation.FULL: "Could not write zeros for preallocation",
    }[preallocation]
    number = error.errno or errno.EIO
    return StorageError(f"{what}: {os.strerror(number)}", errno=number)
