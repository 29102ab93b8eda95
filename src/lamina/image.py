"""``Image``: a disk as a Python object. ``lamina.open`` makes one."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping

from lamina.block.backend import Backend
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.policy import Policy
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from lamina.bitmaps import Bitmaps
    from lamina.block.info import NodeInfo

_STEP = 1 << 34
"""Bytes: how much of a disk is asked about at once."""


class Region(NamedTuple):
    """A run of bytes of a disk that share one fate."""

    offset: int
    length: int
    present: bool
    """Some layer of the backing chain holds these bytes; the rest reads as zeroes."""
    zero: bool
    """Known to read as zeroes."""
    depth: int
    """Which layer holds them: 0 is the image itself, 1 its backing file, …"""


class Image:
    """An open disk. Close it, or use it as a context manager.

    Methods may be called from several threads at once. All of them raise ``LaminaError``: requests
    that reach behind the end ``StorageError``, writes to an image not opened ``writable``
    ``Refused``. Sizes and offsets are bytes, and may have any alignment.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def size(self) -> int:
        return self._backend.size

    @property
    def format(self) -> str:
        """The name of the driver: ``qcow2``, ``raw``, …"""
        return self._backend.node.driver

    @property
    def filename(self) -> str:
        """A name that opens the same again."""
        return self._backend.node.filename

    @property
    def writable(self) -> bool:
        return not self._backend.read_only

    def info(self) -> NodeInfo:
        """What the image says of itself."""
        return self._backend.info()

    # -- data ------------------------------------------------------------------------------------

    def pread(self, length: int, offset: int) -> bytes:
        return self._backend.read(offset, length)

    def readinto(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill the whole buffer."""
        self._backend.readv([(offset, memoryview(buffer).cast("B"))])

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write all of ``data``: durable after the next ``flush``."""
        self._backend.write(offset, memoryview(data).cast("B"))

    def write_zeroes(self, length: int, offset: int, *, unmap: bool = True) -> None:
        """Make a range read as zeroes, quickly where the format can; ``unmap`` lets go of its
        space."""
        flags = WriteFlags.MAY_UNMAP if unmap else WriteFlags.NONE
        self._backend.write_zeroes(offset, length, flags)

    def discard(self, length: int, offset: int) -> None:
        """The content is no longer needed: a hint, what is read afterwards is undefined."""
        self._backend.discard(offset, length)

    def flush(self) -> None:
        """Everything written so far is durable when this returns."""
        self._backend.flush()

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Cut the disk, or let it grow by zeroes.

        ``preallocation``: off, metadata, falloc or full.
        """
        try:
            how = Preallocation(preallocation)
        except ValueError:
            raise UsageError(f"Invalid preallocation mode '{preallocation}'") from None
        self._backend.truncate(size, how, zeroed=True)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Region]:
        """What the disk holds, in order, without gaps; backing files are looked through."""
        from lamina.block.status import chain_extents

        end = self.size if length is None else offset + length
        last: Region | None = None
        for start in range(offset, end, _STEP):
            for status in chain_extents(self._backend.node, start, min(_STEP, end - start)):
                one = Region(
                    status.extent.guest_offset,
                    status.extent.length,
                    status.extent.kind.name != "BELOW",
                    status.reads_zero,
                    status.depth,
                )
                if last is not None and last[2:] == one[2:]:
                    last = last._replace(length=last.length + one.length)
                    continue
                if last is not None:
                    yield last
                last = one
        if last is not None:
            yield last

    @property
    def bitmaps(self) -> Bitmaps:
        """The dirty bitmaps that this image keeps, by name."""
        from lamina.bitmaps import Bitmaps

        return Bitmaps(self._backend.node.unfiltered)

    def stream(self) -> Stream:
        """The disk as a file object: for ``shutil``, ``tarfile``, file system parsers, …

        >>> import lamina
        >>> lamina.create("s.raw", "raw", 4096)
        >>> with lamina.open("s.raw", format="raw") as image, image.stream() as stream:
        ...     stream.seek(-4, 2)
        ...     stream.read()
        4092
        b'\\x00\\x00\\x00\\x00'
        """
        return Stream(self)

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush and close. Closing twice is harmless."""
        self._backend.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.filename!r} ({self.format}, {self.size} bytes)>"


class Stream(io.RawIOBase):
    """A position on an image. Closing it flushes what was written and leaves the image open."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._image.writable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._image.size}
        position = start[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(self._image.size - self._position, 0)]
        if len(view):
            self._image.readinto(view, self._position)
            self._position += len(view)
        return len(view)

    def write(self, data: ReadableBuffer) -> int:
        """As much as fits in front of the end of the disk."""
        view = memoryview(data).cast("B")
        room = max(self._image.size - self._position, 0)
        if len(view) and not room:
            raise OSError(28, os.strerror(28))
        view = view[:room]
        if len(view):
            self._image.pwrite(view, self._position)
            self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Resize the disk."""
        wanted = self._position if size is None else size
        self._image.resize(wanted)
        return wanted

    def flush(self) -> None:
        if not self.closed and self._image.writable:
            self._image.flush()


# -- behind lamina.open and lamina.create ----------------------------------------------------------


def open_image(
    image: str | os.PathLike[str] | Mapping[str, Any],
    *,
    policy: Policy | str,
    secrets: Mapping[str, bytes | str] | None,
    **how: Any,
) -> Image:
    """See ``lamina.open``."""
    reference = image if isinstance(image, Mapping) else os.fspath(image)
    session = _session(policy, secrets)
    return Image(Backend.open(reference, session=session, resize=how.get("writable", False), **how))


def create_image(
    filename: str | os.PathLike[str],
    format: str,
    size: int | str | None,
    *,
    policy: Policy | str,
    secrets: Mapping[str, bytes | str] | None,
    **how: Any,
) -> None:
    """See ``lamina.create``."""
    from lamina.block.creation import create_image as create
    from lamina.units import parse_size

    if isinstance(size, str):
        size = parse_size(size)
    create(os.fspath(filename), format, session=_session(policy, secrets), size=size, **how)


def _session(policy: Policy | str, secrets: Mapping[str, bytes | str] | None) -> Session:
    known = Secrets()
    for name, value in (secrets or {}).items():
        known.add(name, value.encode() if isinstance(value, str) else value)
    try:
        return Session(known, Policy(policy))
    except ValueError:
        raise UsageError(f"Unknown opening policy '{policy}'") from None
