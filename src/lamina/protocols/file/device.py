"""Block and character devices of the host."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import NodeOptions, ReadRequest, WriteRequest
from lamina.errors import StorageError, UsageError
from lamina.hints import TYPE_CHECKING, ClassVar
from lamina.protocols.file import allocation, locks
from lamina.protocols.file.direct import DirectFileNode, sector_size
from lamina.protocols.file.node import FileNode
from lamina.protocols.file.opening import open_checked
from lamina.units import SECTOR, round_down, round_up

if TYPE_CHECKING:
    from lamina.protocols.file import FileOptions

# Of linux/cdrom.h.
_CDROM_DRIVE_STATUS = 0x5326
_CURRENT_SLOT = (1 << 31) - 1
_DISC_OK = 4
# Of linux/fs.h.
_BLKROGET = 0x125E
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F


class DeviceNode(FileNode):
    """A device has a size that nobody changes, no holes, and its own ways to zero and discard."""

    driver: ClassVar[str] = "host_device"

    def __init__(self, options: NodeOptions, fd: int, path: str, *, locking: bool) -> None:
        super().__init__(options, fd, path, locking=locking)
        self._sector = sector_size(fd) or SECTOR

    def _find_length(self) -> int:
        if not stat.S_ISBLK(os.fstat(self._fd).st_mode):
            return 0  # a character device does not tell
        return os.lseek(self._fd, 0, os.SEEK_END)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA, self, offset)] if length else []

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        yield Columns.from_extents(self.extents(offset, length))

    def _zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        if (offset | length) % self._sector:
            return False
        if may_unmap:
            return allocation.punch(self._fd, offset, length)
        # Beside the page cache only: what the cache holds of the range would outlive the ioctl.
        return self.options.direct and self._range_ioctl(_BLKZEROOUT, offset, length)

    def _give_back(self, offset: int, length: int) -> None:
        start = round_up(offset, self._sector)
        end = round_down(offset + length, self._sector)
        if start < end:
            self._range_ioctl(_BLKDISCARD, start, end - start)

    def _range_ioctl(self, request: int, offset: int, length: int) -> bool:
        """False: not supported. Raises OSError or OverflowError."""
        if sys.platform != "linux":
            return False
        import fcntl

        allocation.check_range(offset, length)
        try:
            fcntl.ioctl(self._fd, request, struct.pack("@QQ", offset, length))
        except OSError as error:
            if error.errno in allocation.UNSUPPORTED:
                return False
            raise
        return True

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        """Nothing happens, and only where nothing has to. Raises UsageError."""
        if preallocation is not Preallocation.OFF:
            raise UsageError(
                f"Preallocation mode '{preallocation.value}' unsupported for this non-regular file"
            )
        self._length = self._find_length()
        if size != self.size and exact:
            raise UsageError("Cannot resize device files")
        if size > self.size:
            raise UsageError("Cannot grow device files")


class DirectDeviceNode(DirectFileNode, DeviceNode):
    """A device behind O_DIRECT."""


class CdromNode(DeviceNode):
    """A drive whose medium comes and goes. It is opened empty, too (O_NONBLOCK)."""

    driver: ClassVar[str] = "host_cdrom"
    open_flags = getattr(os, "O_NONBLOCK", 0)

    def is_inserted(self) -> bool:
        if sys.platform != "linux":
            return True
        import fcntl

        try:
            status = fcntl.ioctl(self._fd, _CDROM_DRIVE_STATUS, _CURRENT_SLOT)
        except OSError:
            return False
        return status == _DISC_OK

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self._require_medium()
        super().readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self._require_medium()
        super().writev(requests, flags)

    def _require_medium(self) -> None:
        if not self.is_inserted():
            raise StorageError.from_errno(errno.ENOMEDIUM, path=self.path)
        if not self._length:
            self._length = self._find_length()


class DirectCdromNode(DirectFileNode, CdromNode):
    """A drive behind O_DIRECT."""


_KINDS: dict[tuple[str, bool], type[DeviceNode]] = {
    ("host_device", False): DeviceNode,
    ("host_device", True): DirectDeviceNode,
    ("host_cdrom", False): CdromNode,
    ("host_cdrom", True): DirectCdromNode,
}


def open_device(driver: str, options: FileOptions, node_options: NodeOptions) -> DeviceNode:
    """``driver`` is host_device or host_cdrom.

    Raises UsageError for what is no device, StorageError where the host refuses.
    """
    path = options.filename
    kind = _KINDS[driver, node_options.direct and hasattr(os, "O_DIRECT")]

    def check(path: str, mode: int) -> None:
        if not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode):
            raise UsageError(
                f"'{driver}' driver requires '{path}' to be either a character or block device",
                path=path,
            )

    fd, read_only = open_checked(path, node_options, check, flags=kind.open_flags)
    try:
        node = kind(node_options, fd, path, locking=locks.available(options.locking))
    except BaseException:
        os.close(fd)
        raise
    node.read_only = read_only
    return node


def is_read_only(fd: int) -> bool:
    """Whether a block device refuses writes."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        return bool(struct.unpack("@i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])
    except OSError:
        return False
