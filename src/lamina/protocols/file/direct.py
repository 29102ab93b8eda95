"""Files behind O_DIRECT: what the host wants aligned, and buffers that are."""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Iterator, Sequence

from lamina.block.alignment import Aligner, aligned_buffer, check_resizable
from lamina.block.limits import Limits, WriteFlags
from lamina.block.node import NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.errors import StorageError
from lamina.hints import Any
from lamina.protocols.file.node import FileNode
from lamina.protocols.file.transfer import preadv, pwritev, rest, runs
from lamina.units import round_up

_CANDIDATES = (1, 512, 1024, 2048, 4096)
"""Bytes: alignments of requests and of buffers to try."""
_SAFE = 4096
_BOUNCE = 1 << 20
"""Bytes that go through an aligned buffer at a time."""
_BLKSSZGET = 0x1268
_XFS_IOC_DIOINFO = 0x800C581E


class DirectFileNode(FileNode):
    """A file that is read and written past the host's page cache.

    Requests of any shape are served: an ``Aligner`` widens them, and what lies in memory where the
    host cannot fetch it goes through an aligned buffer.
    """

    can_send = False

    def __init__(self, options: NodeOptions, fd: int, path: str, *, locking: bool) -> None:
        super().__init__(options, fd, path, locking=locking)
        request_alignment, memory_alignment = probe_alignment(fd)
        self._limits = Limits(
            request_alignment=request_alignment, memory_alignment=memory_alignment
        )
        self._aligner = Aligner(self)

    @property
    def limits(self) -> Limits:
        return self._limits

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self._aligner.readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self._aligner.writev(requests, flags)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        self._aligner.write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        self._aligner.discard(offset, length)

    def _stretches(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Data is read by whole blocks, also the last one of the file."""
        alignment = self._limits.request_alignment
        done = offset
        for start, stop, is_data in super()._stretches(offset, end):
            if is_data:
                stop = min(round_up(stop, alignment), end)
            if stop > done:
                yield max(start, done), stop, is_data
                done = stop

    def apply_permissions(self, perm: Perm, shared: Perm) -> None:
        check_resizable(self, perm)
        super().apply_permissions(perm, shared)

    # -- aligned from here on --------------------------------------------------------------------

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None:
        try:
            for offset, buffers, length in runs(requests):
                done = preadv(self._fd, buffers, offset) if self._fit(buffers) else 0
                if done != length:
                    self._bounced_read(offset, rest(buffers, done), done)
        except (OSError, OverflowError) as error:
            raise self._failure(error) from None

    def aligned_writev(
        self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        super().writev(requests, flags)

    def _write(self, requests: Sequence[WriteRequest]) -> None:
        try:
            for offset, buffers, length in runs(requests):
                done = pwritev(self._fd, buffers, offset) if self._fit(buffers) else 0
                if done != length:
                    self._bounced_write(offset, rest(buffers, done), done)
        except (OSError, OverflowError) as error:
            self._changed()
            raise self._failure(error) from None

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        super().write_zeroes(offset, length, flags)

    def write_zero_bytes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Below the aligner: the range is in our hands already."""
        with aligned_buffer(min(length, _BOUNCE)) as zeroes:
            zeroes[:] = bytes(len(zeroes))
            for start in range(0, length, _BOUNCE):
                self.aligned_writev([(offset + start, zeroes[: length - start])], flags)

    def aligned_discard(self, offset: int, length: int) -> None:
        super()._discard(offset, length)

    # -- memory ----------------------------------------------------------------------------------

    def _fit(self, buffers: Sequence[Any]) -> bool:
        """Whether the host can transfer these buffers where they are."""
        mask = self._limits.memory_alignment - 1
        return all(not (address(buffer) | len(buffer)) & mask for buffer in buffers)

    def _bounced_read(self, offset: int, buffers: Sequence[memoryview], done: int) -> None:
        """Read on from ``offset + done``; behind the end of the file are zeroes."""
        length = sum(map(len, buffers))
        start = offset + done
        if start % self._limits.request_alignment:  # only the end of the file is so crooked
            for buffer in buffers:
                buffer[:] = bytes(len(buffer))
            return
        with aligned_buffer(min(length, _BOUNCE)) as bounce:
            for skip in range(0, length, _BOUNCE):
                part = bounce[: length - skip]
                count = self._read_whole(start + skip, part)
                part[count:] = bytes(len(part) - count)
                for target, source in _parts(buffers, skip, part):
                    target[:] = source

    def _read_whole(self, offset: int, part: memoryview) -> int:
        """The bytes read; fewer than asked for at the end of the file."""
        done = 0
        while done < len(part) and done % self._limits.request_alignment == 0:
            count = preadv(self._fd, (part[done:],), offset + done)
            if count == 0:
                break
            done += count
        return done

    def _bounced_write(self, offset: int, buffers: Sequence[memoryview], done: int) -> None:
        length = sum(map(len, buffers))
        start = offset + done
        with aligned_buffer(min(length, _BOUNCE)) as bounce:
            for skip in range(0, length, _BOUNCE):
                part = bounce[: length - skip]
                for source, target in _parts(buffers, skip, part):
                    target[:] = source
                written = 0
                while written < len(part):
                    written += pwritev(self._fd, (part[written:],), start + skip + written)


def _parts(
    buffers: Sequence[memoryview], skip: int, part: memoryview
) -> Iterator[tuple[memoryview, memoryview]]:
    """Slices of ``buffers``, from their byte ``skip`` on, each with its slice of ``part``."""
    taken = 0
    for buffer in rest(buffers, skip):
        count = min(len(buffer), len(part) - taken)
        yield buffer[:count], part[taken : taken + count]
        taken += count
        if taken == len(part):
            return


def address(buffer: bytes | bytearray | memoryview) -> int:
    """Where a buffer lies in memory; an odd address for one that does not say (read-only)."""
    view = memoryview(buffer)
    if view.readonly or not len(view):
        return 1
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def probe_alignment(fd: int) -> tuple[int, int]:
    """Alignment of requests and of buffers. Raises StorageError where none works."""
    request_alignment, memory_alignment = _ask_host(fd)
    with aligned_buffer(2 * _SAFE) as buffer:
        if not request_alignment:
            request_alignment = _smallest(one for one in _CANDIDATES if _readable(fd, buffer[:one]))
        if not memory_alignment:
            memory_alignment = _smallest(
                one for one in _CANDIDATES if _readable(fd, buffer[one : one + _SAFE])
            )
    if not request_alignment or not memory_alignment:
        raise StorageError(
            "Could not find working O_DIRECT alignment",
            errno=errno.EINVAL,
            hint="Try cache.direct=off",
        )
    return request_alignment, memory_alignment


def _smallest(working: Iterator[int]) -> int:
    """If even single bytes work, nothing was really tried (an empty file): take the safe one."""
    found = next(working, 0)
    return _SAFE if found == 1 else found


def _readable(fd: int, buffer: memoryview) -> bool:
    try:
        preadv(fd, (buffer,), 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _ask_host(fd: int) -> tuple[int, int]:
    """Devices tell the alignment of requests, XFS both; 0: nobody knows."""
    sector = sector_size(fd)
    if sector or sys.platform != "linux":
        return sector, 0
    import fcntl
    import struct

    try:
        # struct dioattr: memory alignment, smallest and largest transfer.
        memory, smallest, _ = struct.unpack("@III", fcntl.ioctl(fd, _XFS_IOC_DIOINFO, bytes(12)))
    except OSError:
        return 0, 0
    return smallest, memory


def sector_size(fd: int) -> int:
    """The logical block size of a block device, in bytes; 0 for everything else."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import struct

    try:
        return int(struct.unpack("@i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])
    except OSError:
        return 0
