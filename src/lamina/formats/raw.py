"""raw: the bytes of ``file`` as they are, or a window onto them.

There is no header, so every file is a raw image; see ``block.probing`` for why a guessed one is not
trusted. The driver stands in every path, so without a window it hands the methods of ``file`` out
as its own.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

from lamina.block.driver import Driver, Measurement
from lamina.block.extents import Columns, Extent
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.options import Type, option, parse
from lamina.errors import ImageUnsupported, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.permissions import Perm


@dataclass(frozen=True)
class RawOptions:
    offset: int = option("offset", Type.SIZE, 0, "first byte of the window")
    size: int | None = option("size", Type.SIZE, None, "length of the window")


@dataclass(frozen=True)
class RawCreateOptions:
    size: int = option("size", Type.SIZE, 0, "Virtual disk size")


class RawNode(Node):
    """``file`` itself, or the ``size`` bytes of it that begin at ``offset``."""

    driver = "raw"
    is_format = True

    def __init__(self, options: NodeOptions, file: Node, offset: int, size: int | None) -> None:
        super().__init__(options)
        self._file = file
        self.set_window(offset, size)

    def set_window(self, offset: int, size: int | None) -> None:
        """``size`` None: to the end of the file, wherever that is."""
        self._offset = offset
        self._window = size
        shortcuts = {"readv": self._file.readv, "writev": self._file.writev}
        if offset == 0 and size is None and type(self._file).event is Node.event:
            # The usual case: a call to us is a call to the file, at no cost.
            self.__dict__.update(shortcuts)
        else:
            for name in shortcuts:
                self.__dict__.pop(name, None)

    @property
    def window(self) -> tuple[int, int | None]:
        """Offset and size as they were given."""
        return self._offset, self._window

    @property
    def size(self) -> int:
        if self._window is not None:
            return self._window
        size = max(self._file.size - self._offset, 0)
        return round_up(size, SECTOR) if size % SECTOR else size

    @property
    def limits(self) -> Limits:
        return self._file.limits

    def info(self) -> NodeInfo:
        below = self._file.info()
        return NodeInfo(self.filename, "raw", self.size, below.actual_size, dirty=below.dirty)

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        shift = self._offset
        self._file.event("read_aio")
        self._file.readv([(offset + shift, buffer) for offset, buffer in requests])

    def prefetch(self, offset: int, length: int) -> None:
        self._file.prefetch(offset + self._offset, length)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        shift = self._offset
        for offset, data in requests:
            self._check_room(offset, len(data))
        self._file.event("write_aio")
        self._file.writev([(offset + shift, data) for offset, data in requests], flags)

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self._check_room(offset, length)
        self._file.write_zeroes(offset + self._offset, length, flags)

    def _check_room(self, offset: int, length: int) -> None:
        """The window must not leak into what lies behind it."""
        if self._window is not None and offset + length > self._window:
            raise StorageError.from_errno(errno.ENOSPC)

    def _discard(self, offset: int, length: int) -> None:
        self._check_room(offset, length)
        self._file.discard(offset + self._offset, length)

    def copy_range_from(
        self, source: Node, source_offset: int, offset: int, length: int
    ) -> int:
        self._check_room(offset, length)
        return self._file.copy_range_from(source, source_offset, offset + self._offset, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        shift = self._offset
        found = self._file.extents(offset + shift, length)
        if not shift:
            return found
        return [one._replace(guest_offset=one.guest_offset - shift) for one in found]

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        shift = self._offset
        for piece in self._file.columns(offset + shift, length):
            yield piece._replace(guest_offset=piece.guest_offset - shift) if shift else piece

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        if self._window is not None:
            raise ImageUnsupported("Cannot resize fixed-size raw disks")
        if size > (1 << 63) - 1 - self._offset:
            raise UsageError("Disk size too large for the chosen offset")
        self._file.truncate(self._offset + size, preallocation, exact=exact, zeroed=zeroed)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """There is no metadata to protect: whatever our users do and tolerate."""
        return perm, shared

    def event(self, name: str) -> None:
        self._file.event(name)


class RawDriver(Driver):
    name = "raw"
    Options = RawOptions
    CreateOptions = RawCreateOptions
    is_format = True
    strong_options = ("offset", "size")

    def open(self, options: RawOptions, context: OpenContext) -> Node:
        file = context.open_child("file")
        _check_window(options, file.size)
        node = RawNode(context.node_options, file, options.offset, options.size)
        node.attach("file", file)
        return node

    def reconfigure(self, node: Node, changes: Mapping[str, Any]) -> None:
        assert isinstance(node, RawNode)
        offset, size = node.window
        options: RawOptions
        options, unknown = parse(RawOptions, {"offset": offset, "size": size, **changes})
        super().reconfigure(node, unknown)
        _check_window(options, node.file.size)
        node.set_window(options.offset, options.size)

    def new_file_size(self, options: Any) -> int:
        return round_up(options.size, SECTOR)

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        """Nothing to do: an empty file of the right length is a raw image."""

    def measure(
        self, options: Any, source: Node | None, context: CreateContext
    ) -> Measurement:
        size = round_up(options.size if source is None else source.size, SECTOR)
        return Measurement(size, size)


def _check_window(options: RawOptions, real_size: int) -> None:
    if options.offset > real_size:
        raise UsageError(
            f"Offset ({options.offset}) cannot be greater than size of the containing file "
            f"({real_size})"
        )
    if options.size is None:
        return
    if options.offset + options.size > real_size:
        raise UsageError(
            f"The sum of offset ({options.offset}) and size ({options.size}) has to be smaller or "
            f"equal to the  actual size of the containing file ({real_size})"
        )
    if options.size % SECTOR:
        raise UsageError("Specified size is not multiple of 512")


DRIVER = RawDriver()
