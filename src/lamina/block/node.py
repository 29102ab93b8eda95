"""The contract of a node: an addressable range of bytes, whatever is behind it.

Protocols say how bytes travel, formats where they live, filters what else happens on the way; all
three are nodes, and whoever uses one cannot tell which. Rules that every node obeys:

* Calls block and are thread-safe. Several threads may read and write at once; requests that overlap
  are applied one after the other, in any order. A batch has no order within itself.
* Offsets and lengths are bytes. Requests lie within ``size`` unless a method says otherwise, and
  respect ``limits``; ``Backend`` is where user requests are checked, so drivers need not.
* Buffers belong to the caller: a node fills them or reads them, and keeps none after returning.
* A failed call raises a ``LaminaError`` and may have done a part of the batch, never anything
  outside it.
* What was written is durable after the next ``flush`` that succeeds.
"""

from __future__ import annotations

import errno
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.permissions import Perm, spell
from lamina.errors import Busy, ImageUnsupported, Refused
from lamina.hints import TYPE_CHECKING, ClassVar
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.dirty import DirtyBitmap

ReadRequest = tuple[int, memoryview]
"""Offset and the writable buffer to fill."""
WriteRequest = tuple[int, "bytes | bytearray | memoryview"]
"""Offset and the bytes to write."""

_PREFETCHED = 1 << 20
"""Bytes that are read at a time where nobody wants them yet."""

_anonymous = itertools.count(100)


@dataclass(frozen=True)
class NodeOptions:
    """The runtime options that all nodes share, as their opener settled them."""

    node_name: str = ""
    filename: str = ""
    """As a user would write it to open this node again; shown in messages."""
    read_only: bool = True
    auto_read_only: bool = False
    """Fall back to read-only where writing is not permitted."""
    force_share: bool = False
    """Tolerate any other user of the file; only for reading."""
    direct: bool = False
    """cache.direct: keep out of the host's page cache."""
    no_flush: bool = False
    """cache.no-flush: flush is a no-op."""
    unmap: bool = False
    """discard=unmap; otherwise discards are ignored."""
    detect_zeroes: str = "off"
    """off, on or unmap: turn writes of zeroes into write_zeroes."""
    probed: bool = False
    """The format was guessed from the content."""


@dataclass(eq=False)
class Attachment:
    """One use of a node: who uses it, for what, and what the user tolerates in others."""

    node: Node
    user: Node | None
    """None: somebody outside of the graph (a tool, an export, a job)."""
    role: str
    perm: Perm
    shared: Perm

    def __str__(self) -> str:
        who = "an unnamed block device" if self.user is None else f"node '{self.user.name}'"
        return f"{who} (uses node '{self.node.name}' as '{self.role}' child)"

    def change(self, perm: Perm, shared: Perm) -> None:
        """Raises Busy, and leaves everything as it was, if others do not tolerate it."""
        before = (self.perm, self.shared)
        self.perm, self.shared = perm, shared
        try:
            self.node.refresh_permissions()
        except BaseException:
            self.perm, self.shared = before
            self.node.refresh_permissions()
            raise

    def detach(self) -> None:
        """End this use; the last one closes the node."""
        if self in self.node.users:
            self.node.users.remove(self)
            if self.node.users:
                self.node.refresh_permissions()
            else:
                self.node.close()


class Node(ABC):
    """See the module's text. Drivers subclass this, or implement an engine ``Mapping``."""

    driver: ClassVar[str]
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    """Filters are looked through when backing chains are walked (``unfiltered``)."""

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self.name = options.node_name or f"#block{next(_anonymous)}"
        self.read_only = options.read_only
        self.children: dict[str, Attachment] = {}
        """By role: ``file``, ``backing``, ``data-file``, …"""
        self.dirty_bitmaps: list[DirtyBitmap] = []
        """Told of every change; see ``block.tracking``."""
        self.users: list[Attachment] = []
        self.may_lie_in_holes: bool | None = None
        """What ``block.status`` found out about the data of an image: finding out is not free."""
        self.closed = False

    # -- what it is ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def size(self) -> int:
        """Length in bytes."""

    @property
    def limits(self) -> Limits:
        return Limits()

    @property
    def filename(self) -> str:
        return self.options.filename

    @abstractmethod
    def info(self) -> NodeInfo: ...

    @property
    def supports_compressed_writes(self) -> bool:
        return False

    # -- data ------------------------------------------------------------------------------------

    @abstractmethod
    def readv(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer. Raises StorageError or ImageCorrupt."""

    def prefetch(self, offset: int, length: int) -> None:
        """These bytes will be wanted soon: have them where reading them is quick.

        The default reads them; whoever reaches them over a network may ask the other side to.
        """
        scratch = memoryview(bytearray(min(length, _PREFETCHED)))
        end = offset + length
        for start in range(offset, end, _PREFETCHED):
            self.readv([(start, scratch[: end - start])])

    @abstractmethod
    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write every buffer. Only protocols grow by being written behind their end."""

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        """Write whole encoded units (clusters; the last one may be cut by the end of the disk)."""
        raise ImageUnsupported("Compression not supported for this file format")

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        """Make the range read as zeroes, quickly where possible.

        The default writes zeroes; with NO_FALLBACK it raises ImageUnsupported (ENOTSUP).
        """
        if flags & WriteFlags.NO_FALLBACK:
            raise ImageUnsupported("Operation not supported")
        self.write_zero_bytes(offset, length, flags)

    def write_zero_bytes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Write zeroes the slow way, a megabyte at a time."""
        chunk = memoryview(bytes(min(length, 1 << 20)))
        for start in range(offset, offset + length, 1 << 20):
            part = chunk[: min(1 << 20, offset + length - start)]
            self.writev([(start, part)], flags & WriteFlags.FUA)

    def discard(self, offset: int, length: int) -> None:
        """The content is no longer needed. A hint: content afterwards is undefined or zero."""
        if self.options.unmap:
            self._discard(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        """What a driver that can discard overrides."""

    def flush(self) -> None:
        """Everything written so far is durable when this returns."""
        if not self.options.no_flush:
            self._flush()

    def _flush(self) -> None:
        """What a driver that holds anything back overrides."""
        for attachment in self.children.values():
            attachment.node.flush()

    def copy_range_from(
        self, source: Node, source_offset: int, offset: int, length: int
    ) -> int:
        """Copy bytes of another node without having them pass through memory.

        Returns how many were copied, perhaps none: the rest has to be read and written.
        """
        return 0

    can_send: ClassVar[bool] = False
    """``send_to`` does something."""

    def send_to(self, descriptor: int, offset: int, length: int) -> int:
        """Send bytes to a socket without having them pass through memory.

        Returns how many were sent, perhaps none: the rest has to be read. Raises OSError.
        """
        return 0

    @abstractmethod
    def extents(self, offset: int, length: int) -> list[Extent]:
        """Where these bytes are, in order, without gaps; this layer only (``Kind.BELOW``)."""

    @property
    def fixed(self) -> bool:
        """Formats: every byte has its place in a file from the start, whose holes read as zeroes.

        (Not for those whose ``extents`` are those of the file.)
        """
        return False

    def uses_more_than(self, length: int) -> bool:
        """Formats: whether more bytes than this of ``file`` are in use, as far as is known."""
        return self.file.size > length

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        """The same as arrays, piece after piece, for whole-image work."""
        step = 1 << 36
        for start in range(offset, offset + length, step):
            yield Columns.from_extents(self.extents(start, min(step, offset + length - start)))

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        """Change the length. New space reads as zeroes if ``zeroed``, else as whatever is below.

        Without ``exact`` a node that cannot shrink may stay longer. Raises ImageUnsupported.
        """
        raise ImageUnsupported("Image format driver does not support resize")

    # One-request helpers -------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.readv([(offset, memoryview(buffer))])
        return bytes(buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writev([(offset, memoryview(data))])

    # VM state, for formats with internal snapshots -----------------------------------------------

    @property
    def vmstate_offset(self) -> int:
        """Address behind the disk at which VM state begins; 0: this node keeps none."""
        return 0

    def read_vmstate(self, offset: int, buffer: memoryview) -> None:
        raise ImageUnsupported("Operation not supported")

    def write_vmstate(self, offset: int, data: memoryview) -> None:
        raise ImageUnsupported("Operation not supported")

    # -- debugging -------------------------------------------------------------------------------

    def event(self, name: str) -> None:
        """A format tells its ``file`` what it is about to do; blkdebug listens, others do not."""

    # -- life ------------------------------------------------------------------------------------

    def reopen(self, *, read_only: bool) -> None:
        """Switch between reading and writing, this node and its children except the backing file.

        If something refuses, everything stays as it was.
        """
        if read_only == self.read_only:
            return
        if read_only:
            self.flush()
        switched: list[Node] = []
        try:
            if read_only:
                # First stop wanting to write, then take the ability away from the children.
                self._set_read_only(True)
            for role, attachment in self.children.items():
                if role != "backing":
                    switched.append(attachment.node)
                    attachment.node.reopen(read_only=read_only)
            if not read_only:
                self._set_read_only(False)
        except BaseException:
            for node in switched:
                node.reopen(read_only=not read_only)
            self._set_read_only(not read_only)
            raise

    def _set_read_only(self, read_only: bool) -> None:
        self.read_only = read_only
        self.refresh_permissions()

    def close(self) -> None:
        """Flush, close, let go of the children. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        try:
            self._close()
        finally:
            for attachment in self.children.values():
                attachment.detach()

    def close_unused(self) -> None:
        """Close what nobody uses, or no longer."""
        if not self.users:
            self.close()

    def _close(self) -> None:
        """What a driver with something to finish overrides. The children are still open, and finish
        what is theirs when they are closed."""

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the graph -------------------------------------------------------------------------------

    def child(self, role: str) -> Node | None:
        attachment = self.children.get(role)
        return attachment.node if attachment else None

    @property
    def file(self) -> Node:
        """The ``file`` child; only for nodes that have one."""
        return self.children["file"].node

    @property
    def backing(self) -> Node | None:
        return self.child("backing")

    @property
    def unfiltered(self) -> Node:
        """This node, or what its filters filter."""
        node = self
        while node.is_filter:
            node = node.file
        return node

    def attach(
        self, role: str, node: Node, perm: Perm | None = None, shared: Perm | None = None
    ) -> Attachment:
        """Take ``node`` as a child. Without permissions: those of ``child_permissions``."""
        default = self.child_permissions(role, *self.cumulative_permissions())
        attachment = node.used_by(
            self,
            role,
            default[0] if perm is None else perm,
            default[1] if shared is None else shared,
        )
        self.children[role] = attachment
        return attachment

    def replace_child(self, role: str, node: Node | None) -> None:
        """Put another node (or none) in the place of a child. If that fails, the old one stays."""
        old = self.children.pop(role, None)
        if node is not None:
            try:
                self.attach(role, node)
            except BaseException:
                if old is not None:
                    self.children[role] = old
                raise
        if old is not None:
            old.detach()

    def used_by(self, user: Node | None, role: str, perm: Perm, shared: Perm) -> Attachment:
        """Register a use of this node. Raises Busy if other users do not tolerate it."""
        attachment = Attachment(self, user, role, perm, shared)
        self.users.append(attachment)
        try:
            self.refresh_permissions()
        except BaseException:
            self.users.remove(attachment)
            self.refresh_permissions()
            raise
        return attachment

    def cumulative_permissions(self) -> tuple[Perm, Perm]:
        """(what somebody does, what everybody tolerates), over all users."""
        perm, shared = Perm.NONE, Perm.ALL
        for use in self.users:
            perm |= use.perm
            shared &= use.shared
        return perm, shared

    def refresh_permissions(self) -> None:
        """Check the users against each other, then pass the sums on to children and storage."""
        for one in self.users:
            for other in self.users:
                if one is not other and one.perm & ~other.shared:
                    raise Busy(
                        f"Permission conflict on node '{self.name}': permissions "
                        f"'{spell(one.perm & ~other.shared)}' are both required by {one} "
                        f"and unshared by {other}."
                    )
        perm, shared = self.cumulative_permissions()
        if perm & (Perm.WRITE | Perm.RESIZE) and self.read_only:
            raise Refused("Block node is read-only", errno=errno.EACCES)
        for role, attachment in self.children.items():
            wanted = self.child_permissions(role, perm, shared)
            if wanted != (attachment.perm, attachment.shared):
                attachment.perm, attachment.shared = wanted
                attachment.node.refresh_permissions()
        self.apply_permissions(perm, shared)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node needs from a child, given what its own users do and tolerate.

        Filters pass both on. A format reads its metadata and may not have it changed under it; it
        writes and resizes whenever it is open for writing. A backing file is only read; who
        tolerates that the disk changes tolerates it there as well.
        """
        if role == "backing":
            tolerated = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            if shared & Perm.WRITE:
                tolerated |= Perm.WRITE | Perm.RESIZE
            return perm & Perm.CONSISTENT_READ, tolerated
        if self.is_format:
            need = Perm.CONSISTENT_READ
            if not self.read_only:
                need |= Perm.WRITE | Perm.RESIZE
            tolerated = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            return need, Perm.ALL if self.options.force_share else tolerated
        return perm, shared

    def apply_permissions(self, perm: Perm, shared: Perm) -> None:
        """Where permissions reach the storage: the file protocol locks bytes. Raises Busy."""
