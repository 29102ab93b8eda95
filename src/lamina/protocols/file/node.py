"""The node of a regular file."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.errors import ImageUnsupported, StorageError
from lamina.hints import TYPE_CHECKING, Any, ClassVar, TypeVar
from lamina.protocols.file.cold import ColdReads
from lamina.protocols.file.holes import HoleMap
from lamina.protocols.file.locks import FileLocks
from lamina.protocols.file.transfer import (
    continue_read,
    continue_write,
    pieces,
    preadv,
    pwritev,
    runs,
)
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.protocols.file.space import SpaceForWrites

T = TypeVar("T")

_LIMITS = Limits()
_NO_FLAGS = WriteFlags.NONE
_LONG = 256 << 10
"""Bytes of a write from where on it pays to take the space for it first."""
_PIECE = 512 << 10
"""Bytes of a write to where a file has its space already. More at a time makes ext4 look for larger
pieces of memory for its cache, which takes now and then as long as writing twice."""
_ROWS = 1 << 16
"""Of one piece of columns."""
_NOT_HERE = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF})
"""What copy_file_range answers where this pair of files cannot be copied inside the kernel."""


class FileNode(Node):
    """Reads and writes go straight to the host, positioned, without any lock of our own.

    The descriptor keeps its number for life: reopening puts another open file under it (``dup2``),
    so that requests under way are not disturbed.
    """

    driver: ClassVar[str] = "file"
    can_send: ClassVar[bool] = sys.platform == "linux"
    open_flags: ClassVar[int] = 0
    """For open(2), beside those that all files are opened with."""

    def __init__(self, options: NodeOptions, fd: int, path: str, *, locking: bool) -> None:
        super().__init__(options)
        self.path = path
        self._fd = fd
        self._holes = HoleMap(fd)
        self._locks = FileLocks(fd, path) if locking else None
        self._length = self._find_length()
        self._growth = threading.Lock()
        self._space: SpaceForWrites | None = None
        """Of a file that long writes go to."""
        self._cold = ColdReads()
        self._flushing = threading.Lock()
        self._unflushed = False
        self._flush_error = 0
        """The errno of the first flush that failed."""

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The length of the file, rounded up to whole sectors; the rest reads as zeroes."""
        return -(-self._length // SECTOR) * SECTOR

    @property
    def limits(self) -> Limits:
        return _LIMITS

    def info(self) -> NodeInfo:
        return NodeInfo(
            filename=self.filename or self.path,
            format=self.driver,
            virtual_size=self.size,
            actual_size=self.allocated_size(),
            specific={},
        )

    def allocated_size(self) -> int | None:
        """Bytes that the file takes on its file system; None where the host does not say."""
        blocks: int | None = getattr(os.fstat(self._fd), "st_blocks", None)
        return None if blocks is None else blocks * 512

    def _find_length(self) -> int:
        return os.fstat(self._fd).st_size

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        try:
            if len(requests) == 1:
                offset, buffer = requests[0]
                done = preadv(self._fd, (buffer,), offset)
                if done != len(buffer):
                    continue_read(self._fd, (buffer,), offset, done)
            else:
                scattered = runs(requests)
                start = self._cold.begin(self._fd, scattered)
                for offset, buffers, length in scattered:
                    done = preadv(self._fd, buffers, offset)
                    if done != length:
                        continue_read(self._fd, buffers, offset, done)
                self._cold.end(start, scattered)
        except (OSError, OverflowError) as error:
            raise self._failure(error) from None

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        if len(requests) == 1:
            offset, data = requests[0]
            end = offset + len(data)
        else:
            end = max((offset + len(data) for offset, data in requests), default=0)
        if end > self._length:
            self._grow(lambda: self._write(requests))
        else:
            self._write(requests)
        self._holes.generation += 1
        self._unflushed = True
        if flags is not _NO_FLAGS and flags & WriteFlags.FUA:
            self.flush()

    def _write(self, requests: Sequence[WriteRequest]) -> None:
        try:
            if len(requests) == 1:
                offset, data = requests[0]
                if len(data) >= _LONG:
                    self._write_long(offset, (data,), len(data))
                    return
                done = pwritev(self._fd, (data,), offset)
                if done != len(data):
                    continue_write(self._fd, (data,), offset, done)
            else:
                for offset, buffers, length in runs(requests):
                    if length >= _LONG:
                        self._write_long(offset, buffers, length)
                        continue
                    done = pwritev(self._fd, buffers, offset)
                    if done != length:
                        continue_write(self._fd, buffers, offset, done)
        except (OSError, OverflowError) as error:
            self._changed()
            raise self._failure(error) from None

    def _write_long(self, offset: int, buffers: Sequence[Any], length: int) -> None:
        """Raises OSError or OverflowError."""
        if self._space is None:
            from lamina.protocols.file.space import SpaceForWrites

            self._space = SpaceForWrites(self._fd)
        longest = length if self._space.take(offset, length) else _PIECE
        for piece in pieces(buffers, longest):
            done = pwritev(self._fd, piece, offset)
            size = sum(map(len, piece))
            if done != size:
                continue_write(self._fd, piece, offset, done)
            offset += size

    def _grow(self, action: Callable[[], T]) -> T:
        """Do what may make the file longer.

        One at a time: a length that is set while somebody else writes behind it would cut off what
        they wrote. (The host writes behind the end of a file one at a time as well.)
        """
        with self._growth:
            try:
                return action()
            finally:
                self._length = self._find_length()

    def _failure(self, error: OSError | OverflowError) -> StorageError:
        """Overflow: an offset (a damaged image may name any) that the host cannot express."""
        if isinstance(error, OverflowError):
            return StorageError.from_errno(errno.EINVAL, path=self.path)
        return StorageError.from_os_error(error, path=self.path)

    def _changed(self) -> None:
        """The file is not what it was: what is known of its holes, and the last flush, are old."""
        self._holes.generation += 1
        self._unflushed = True

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        may_unmap = bool(flags & WriteFlags.MAY_UNMAP)

        def zero() -> bool:
            return self._zero(offset, length, may_unmap=may_unmap)

        try:
            done = self._grow(zero) if offset + length > self._length else zero()
        except (OSError, OverflowError) as error:
            raise self._failure(error) from None
        finally:
            self._changed()
        if not done:
            if flags & WriteFlags.NO_FALLBACK:
                raise ImageUnsupported("Operation not supported")
            self.write_zero_bytes(offset, length, flags & ~WriteFlags.FUA)
        if flags & WriteFlags.FUA:
            self.flush()

    def _zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """Zero without writing; False: the host cannot. Raises OSError."""
        from lamina.protocols.file import allocation

        return allocation.zero(self._fd, offset, length, may_unmap=may_unmap)

    def _discard(self, offset: int, length: int) -> None:
        try:
            self._give_back(offset, length)
        except (OSError, OverflowError) as error:
            raise self._failure(error) from None
        finally:
            self._changed()

    def _give_back(self, offset: int, length: int) -> None:
        """Raises OSError, but not where the host merely cannot."""
        from lamina.protocols.file import allocation

        allocation.punch(self._fd, offset, length)

    def send_to(self, descriptor: int, offset: int, length: int) -> int:
        done = 0
        while done < length:
            try:
                count = os.sendfile(descriptor, self._fd, offset + done, length - done)
            except OSError:
                if not done:
                    raise
                break  # whoever goes on will see
            if count == 0:  # the end of the file
                break
            done += count
        return done

    def copy_range_from(self, source: Node, source_offset: int, offset: int, length: int) -> int:
        """Copy inside the kernel, possibly by sharing blocks; the bytes that were copied.

        Fewer than ``length``, down to 0, mean that the rest has to be read and written: another
        kind of source, another file system, or the source's end. Raises StorageError.
        """
        if not isinstance(source, FileNode) or not hasattr(os, "copy_file_range"):
            return 0

        def copy() -> int:
            return _copy_range(source._fd, self._fd, source_offset, offset, length)

        try:
            return self._grow(copy) if offset + length > self._length else copy()
        except (OSError, OverflowError) as error:
            raise self._failure(error) from None
        finally:
            self._changed()

    def _flush(self) -> None:
        """Once a flush has failed nobody can know what the host still has: it stays failed."""
        with self._flushing:
            if self._flush_error:
                raise StorageError.from_errno(self._flush_error, path=self.path)
            if not self._unflushed:
                return
            self._unflushed = False
            try:
                _synchronise(self._fd)
            except OSError as error:
                self._flush_error = error.errno or errno.EIO
                raise StorageError.from_errno(self._flush_error, path=self.path) from None

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Data and holes, to the byte. A hole is what the file system says is one."""
        return [
            Extent(start, stop - start, Kind.DATA if is_data else Kind.ZERO, self, start)
            for start, stop, is_data in self._stretches(offset, offset + length)
        ]

    def _stretches(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, is_data)."""
        return self._holes.stretches(offset, end, self._length)

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        import numpy as np

        stretches = self._stretches(offset, offset + length)
        while piece := list(itertools.islice(stretches, _ROWS)):
            table = np.array(piece, dtype=np.int64)
            start = table[:, 0].copy()
            yield Columns(
                guest_offset=start,
                length=table[:, 1] - start,
                kind=np.where(table[:, 2] != 0, Kind.DATA, Kind.ZERO).astype(np.uint8),
                host_offset=start,
                stored_length=np.zeros(len(piece), dtype=np.int64),
                node=np.zeros(len(piece), dtype=np.uint8),
                nodes=(self,),
            )

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        """New space always reads as zeroes. Raises UsageError or StorageError."""
        from lamina.protocols.file import allocation

        try:
            self._grow(lambda: allocation.set_length(self._fd, self._length, size, preallocation))
        finally:
            self._changed()

    # -- life ------------------------------------------------------------------------------------

    def refresh_permissions(self) -> None:
        """With auto-read-only, the file is opened for writing when the first writer comes."""
        if self.read_only and self.options.auto_read_only and not self.options.read_only:
            perm, _ = self.cumulative_permissions()
            if perm & (Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE):
                self._exchange(read_only=False)
        super().refresh_permissions()

    def apply_permissions(self, perm: Perm, shared: Perm) -> None:
        if self.closed or self._locks is None:
            return
        if self.options.force_share:
            shared = Perm.ALL
        self._locks.apply(perm, shared)
        self._holes.exclusive = bool(perm) and not shared & Perm.WRITE

    def reopen(self, *, read_only: bool) -> None:
        if read_only == self.read_only:
            return
        if read_only:
            self.flush()
        self._exchange(read_only=read_only)
        self.refresh_permissions()

    def _exchange(self, *, read_only: bool) -> None:
        """Put a descriptor of the other kind in the place of ours. Raises StorageError."""
        from lamina.protocols.file.opening import open_descriptor

        replacement = open_descriptor(
            self.path,
            read_only=read_only,
            direct=self.options.direct,
            flags=self.open_flags,
        )
        try:
            if self._locks is not None:
                self._locks.move_to(replacement)
            os.dup2(replacement, self._fd, inheritable=False)
        finally:
            os.close(replacement)
        self.read_only = read_only

    def _close(self) -> None:
        try:
            if not self.read_only:
                self.flush()
        finally:
            # No later call may find the file that gets this number next.
            fd, self._fd = self._fd, -1
            os.close(fd)


def _copy_range(source: int, target: int, source_offset: int, offset: int, length: int) -> int:
    """Bytes that copy_file_range copied before it came to an end, or did not want to. Raises
    OSError."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                source, target, length - done, source_offset + done, offset + done
            )
        except OSError as error:
            if error.errno in _NOT_HERE:
                break
            raise
        if count == 0:
            break
        done += count
    return done


def _synchronise(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, 51)  # F_FULLFSYNC: fsync leaves data in the drive's cache
        except OSError:
            os.fsync(fd)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)
