"""A user's handle on a node: where requests from outside are checked.

Nodes trust their callers (``block.node``). Tools, jobs and exports come in through a ``Backend``,
which knows what its user asked for (permissions, cache mode) and refuses what lies outside.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.errors import Refused, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.extents import Extent
    from lamina.block.info import NodeInfo
    from lamina.block.session import Session

_WRITES = Perm.WRITE | Perm.WRITE_UNCHANGED

_GUESSED_RAW = """\
WARNING: Image format was not specified for '{}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, \
write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions.
"""


class Backend:
    """One use of the graph from outside. Close it, or use it as a context manager.

    ``writethrough``: every write is durable when it returns.
    """

    def __init__(
        self,
        node: Node,
        *,
        perm: Perm = Perm.CONSISTENT_READ,
        shared: Perm = Perm.ALL,
        writethrough: bool = False,
    ) -> None:
        """Raises Busy if other users of ``node`` do not tolerate this one."""
        self.node = node
        self._attachment = node.used_by(None, "root", perm, shared)
        self._writethrough = writethrough
        self._refresh()

    @classmethod
    def open(
        cls,
        reference: str | Mapping[str, Any],
        *,
        session: Session,
        format: str | None = None,
        image_opts: bool = False,
        writable: bool = False,
        cache: str = "writeback",
        force_share: bool = False,
        discard: str | None = None,
        detect_zeroes: str | None = None,
        resize: bool = False,
        inspect: bool = False,
        check: bool = False,
        backing: bool = True,
        copy_on_read: bool = False,
        options: Mapping[str, Any] | None = None,
        perm: Perm | None = None,
        shared: Perm | None = None,
    ) -> Backend:
        """Open a file name, ``json:{…}``, an option string (``image_opts``) or options.

        ``format`` is the driver to use rather than the guessed one; ``cache`` a word of
        ``block.cache_modes``; ``discard`` and ``detect_zeroes`` are what the generic options of
        these names are unless ``options`` say otherwise; ``inspect``, ``check`` and ``backing`` as
        for ``block.opening.open_node``. Without ``perm`` the user reads, and writes if
        ``writable``, and resizes if ``resize``; without ``shared`` it tolerates everything in
        others. With ``copy_on_read`` what is read from backing files is kept in the image, by a
        filter of that name on top.
        """
        from lamina.block.cache_modes import cache_mode
        from lamina.block.opening import open_node

        mode = cache_mode(cache)
        extra = dict(options or {})
        if image_opts:
            from lamina.block.keyvalue import parse_keyvalue

            reference = parse_keyvalue(str(reference), "file", warn=session.warn)
        if format is not None:
            extra["driver"] = format
        defaults = NodeOptions(
            read_only=not writable,
            force_share=force_share,
            direct=mode.direct,
            no_flush=mode.no_flush,
        )
        if discard is not None or detect_zeroes is not None:
            defaults = _with_zero_modes(defaults, discard, detect_zeroes)
        node = open_node(
            reference,
            session=session,
            defaults=defaults,
            options=extra,
            inspect=inspect,
            check=check,
            backing=backing,
        )
        if perm is None:
            perm = _usual_permissions(writable, resize)
        guessed_raw = node.options.probed and node.driver == "raw" and not node.read_only
        if copy_on_read:
            node = _copying_on_read(node, session)
        try:
            backend = cls(
                node,
                perm=perm,
                shared=Perm.ALL if shared is None else shared,
                writethrough=not mode.writeback,
            )
        except BaseException:
            node.close_unused()
            raise
        if guessed_raw:
            session.warn(_GUESSED_RAW.format(node.unfiltered.filename).rstrip("\n"))
        return backend

    def _refresh(self) -> None:
        """Look up what the hot paths ask for; again whenever it may have changed."""
        node = self.node
        self._writable = bool(self._attachment.perm & _WRITES) and not node.read_only
        detect = node.options.detect_zeroes
        self._zero_flags: WriteFlags | None = None
        if detect != "off":
            self._zero_flags = WriteFlags.MAY_UNMAP if detect == "unmap" else WriteFlags.NONE
        # A raw image whose format was guessed must not turn into something else: block 0.
        below = node.unfiltered
        self._guarded = below.options.probed and below.driver == "raw"
        self._plain_writes = not (
            self._guarded or self._writethrough or self._zero_flags is not None
        )

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes."""
        return self.node.size

    @property
    def read_only(self) -> bool:
        return not self._writable

    @property
    def limits(self) -> Limits:
        return self.node.limits

    def info(self) -> NodeInfo:
        return self.node.info()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Raises StorageError (EIO) behind the end."""
        self._check_range(offset, length)
        return self.node.extents(offset, length)

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every buffer. Raises StorageError (EIO) if one lies behind the end."""
        size = self.node.size
        for offset, buffer in requests:
            if offset < 0 or offset + len(buffer) > size:
                raise StorageError.from_errno(errno.EIO)
        self.node.readv(requests)

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.readv([(offset, memoryview(buffer))])
        return bytes(buffer)

    def prefetch(self, offset: int, length: int) -> None:
        """See ``Node.prefetch``. Raises StorageError (EIO) behind the end."""
        self._check_range(offset, length)
        self.node.prefetch(offset, length)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write every buffer. Raises Refused if this use does not write, StorageError (EIO) for
        what lies behind the end."""
        if not self._writable:
            raise _read_only()
        size = self.node.size
        for offset, data in requests:
            if offset < 0 or offset + len(data) > size:
                raise StorageError.from_errno(errno.EIO)
        if self._plain_writes:
            self.node.writev(requests, flags)
        else:
            self._write_specially(requests, flags)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self.writev([(offset, data)], flags)

    def _write_specially(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        if self._guarded:
            self._check_still_raw(requests)
        if self._writethrough:
            flags |= WriteFlags.FUA
        if self._zero_flags is not None:
            from lamina.block.zeroes import is_zero

            rest = []
            for offset, data in requests:
                if is_zero(data):
                    self.node.write_zeroes(offset, len(data), flags | self._zero_flags)
                else:
                    rest.append((offset, data))
            requests = rest
        if requests:
            self.node.writev(requests, flags)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        """Whole encoded units; see ``Node.write_compressed``."""
        self._check_writable()
        for offset, data in requests:
            self._check_range(offset, len(data))
        self.node.write_compressed(requests)
        if self._writethrough:
            self.node.flush()

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self._check_writable()
        self._check_range(offset, length)
        if self._writethrough:
            flags |= WriteFlags.FUA
        if length:
            self.node.write_zeroes(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        """A hint; units that the range covers only in part are left alone."""
        self._check_writable()
        self._check_range(offset, length)
        if length:
            self.node.discard(offset, length)

    def write_vmstate(self, offset: int, data: memoryview) -> None:
        """Bytes of VM state, which formats with internal snapshots keep behind the disk."""
        self._check_writable()
        self.node.unfiltered.write_vmstate(offset, data)
        if self._writethrough:
            self.node.flush()

    def flush(self) -> None:
        self.node.flush()

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        """Change the size; takes the permission to do so for as long as it needs it."""
        if size < 0:
            raise UsageError("Required too big image size, it must be not greater than 2^63 - 1")
        if self.node.read_only:
            raise Refused("Image is read-only", errno=errno.EACCES)
        perm, shared = self._attachment.perm, self._attachment.shared
        temporary = not perm & Perm.RESIZE
        if temporary:
            self._attachment.change(perm | Perm.RESIZE, shared)
        try:
            self.node.truncate(size, preallocation, exact=exact, zeroed=zeroed)
        finally:
            if temporary:
                self._attachment.change(perm, shared)

    def _check_writable(self) -> None:
        if not self._writable:
            raise _read_only()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.node.size:
            raise StorageError.from_errno(errno.EIO)

    def _check_still_raw(self, requests: Sequence[WriteRequest]) -> None:
        """Raises Refused if these writes together made block 0 look like another format."""
        from lamina.block.probing import PROBE_SIZE, probe

        if all(offset >= PROBE_SIZE for offset, _ in requests):
            return
        head = bytearray(self.read(0, min(PROBE_SIZE, self.node.size)))
        for offset, data in requests:
            if offset < len(head):
                part = bytes(memoryview(data)[: len(head) - offset])
                head[offset : offset + len(part)] = part
        if probe(bytes(head), self.node.filename) != "raw":
            raise Refused("Operation not permitted")

    # -- life ------------------------------------------------------------------------------------

    def change_permissions(self, perm: Perm, shared: Perm) -> None:
        """Raises Busy, and changes nothing, if others do not tolerate it."""
        self._attachment.change(perm, shared)
        self._refresh()

    def unshare(self, perm: Perm) -> None:
        """Tolerate that in others no more. Raises Busy where somebody does it."""
        self.change_permissions(self._attachment.perm, self._attachment.shared & ~perm)

    def reopen(
        self, *, writable: bool, writethrough: bool | None = None, perm: Perm | None = None
    ) -> None:
        """Switch between reading and writing, or to another cache mode."""
        shared = self._attachment.shared
        if not writable:
            self._attachment.change(Perm.CONSISTENT_READ if perm is None else perm, shared)
            self.node.reopen(read_only=True)
        else:
            self.node.reopen(read_only=False)
            wanted = Perm.CONSISTENT_READ | Perm.WRITE if perm is None else perm
            self._attachment.change(wanted, shared)
        if writethrough is not None:
            self._writethrough = writethrough
        self._refresh()

    def reopen_with(self, options: Mapping[str, Any], *, writethrough: bool | None = None) -> None:
        """Change runtime options (``block.reopening``), ``read-only`` included."""
        from lamina.block.options import Spec, Type, convert
        from lamina.block.reopening import change_options

        rest = dict(options)
        writable = self._writable
        if "read-only" in rest:
            read_only = convert(Spec("read-only", Type.BOOL, ""), rest.pop("read-only"))
            if read_only == writable:
                self.reopen(writable=not read_only)
        try:
            change_options(self.node, rest)
        except BaseException:
            if writable != self._writable:
                self.reopen(writable=writable)
            raise
        if writethrough is not None:
            self._writethrough = writethrough
        self._refresh()

    def close(self) -> None:
        """End this use; the last user's end closes the node. Closing twice is harmless."""
        self._attachment.detach()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _usual_permissions(writable: bool, resize: bool) -> Perm:
    perm = Perm.CONSISTENT_READ
    if writable:
        perm |= Perm.WRITE
        if resize:
            perm |= Perm.RESIZE
    return perm


def _with_zero_modes(
    defaults: NodeOptions, discard: str | None, detect_zeroes: str | None
) -> NodeOptions:
    from lamina.block.generic_options import generic_options

    words = {"discard": discard, "detect-zeroes": detect_zeroes}
    given = {key: word for key, word in words.items() if word is not None}
    settings, _ = generic_options(given, defaults)
    return settings


def _copying_on_read(node: Node, session: Session) -> Node:
    """The filter that keeps what is read from backing files, put on top of ``node``."""
    from lamina.block.opening import open_node

    try:
        if node.read_only:
            raise UsageError("Can't use copy-on-read on read-only device")
        if not node.options.node_name:
            session.add_node(node)
        return open_node(
            {"driver": "copy-on-read", "file": node.name},
            session=session,
            defaults=replace(node.options, node_name="", probed=False),
        )
    except BaseException:
        node.close_unused()
        raise


def _read_only() -> Refused:
    return Refused("Block node is read-only", errno=errno.EACCES)
