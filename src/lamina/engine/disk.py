"""The node that wraps a mapping: a format's tables plus the engine make a disk.

Threads and locks. ``lock`` guards the mapping, its tables and the metadata store; it is held while
the mapping is asked something and while metadata is written, never while guest data moves.
Requests that change the same allocation unit exclude each other by ``ranges``; reads pin what they
resolved by ``pins`` (``engine.locks``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from lamina.block.alignment import Aligner
from lamina.block.extents import Kind
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, ReadRequest, WriteRequest
from lamina.engine.cache import UnitCache
from lamina.engine.locks import Ranges
from lamina.engine.reader import Reader
from lamina.engine.writer import Writer
from lamina.errors import ImageUnsupported, LaminaError
from lamina.hints import TYPE_CHECKING, TypeVar
from lamina.units import round_up

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.extents import Columns, Extent
    from lamina.block.info import NodeInfo
    from lamina.block.permissions import Perm
    from lamina.engine.clearing import Clearing
    from lamina.engine.mapping import Mapping

AnyMapping = TypeVar("AnyMapping", bound="Mapping")

_NO_FLAGS = WriteFlags.NONE

EVERYTHING = 1 << 63
"""No guest address lies behind this."""


class Disk(Node):
    """A node made of a format's mapping."""

    is_format = True
    mapping: Mapping

    def __init__(self, context: OpenContext, load: Callable[[Disk], Mapping]) -> None:
        """Open the child ``file``, then have ``load`` make the mapping of it.

        ``load`` finds this disk with ``file`` attached and may attach further children; whatever it
        raises closes everything that was opened.
        """
        super().__init__(context.node_options)
        self.context = context
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self.ranges = Ranges(self._changed)
        self.units = UnitCache()
        self.reader = Reader(self)
        self.writer = Writer(self)
        try:
            self.attach("file", context.open_child("file"))
            self.mapping = load(self)
            # A class of nodes has one driver; disks take theirs from the mapping.
            self.__dict__["driver"] = self.mapping.driver
            self.metadata = self.mapping.metadata
            self.pins = self.metadata.pins
            if self.mapping.request_alignment > 1:
                self._align_requests()
            # Roles that the mapping knows more about than every format does.
            self.refresh_permissions()
        except BaseException:
            self.closed = True
            for attachment in list(self.children.values()):
                attachment.detach()
            raise

    def _align_requests(self) -> None:
        """Encrypted sectors are read and written whole: requests of any shape are made of those."""
        aligner = Aligner(self)
        for name in ("readv", "writev", "write_zeroes"):
            setattr(self, name, getattr(aligner, name))

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None:
        Disk.readv(self, requests)

    def aligned_writev(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        Disk.writev(self, requests, flags)

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        Disk.write_zeroes(self, offset, length, flags)

    def aligned_discard(self, offset: int, length: int) -> None:
        self._discard(offset, length)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self.mapping.size

    @cached_property
    def clearing(self) -> Clearing:
        # Most disks are only read, or only written to.
        from lamina.engine.clearing import Clearing

        return Clearing(self, self.writer)

    @property
    def allocation_unit(self) -> int:
        """In guest bytes."""
        return self.mapping.allocation_unit or self.mapping.unit

    @property
    def limits(self) -> Limits:
        mapping = self.mapping
        return Limits(
            request_alignment=mapping.request_alignment,
            write_zeroes_alignment=mapping.unit,
            write_unit=mapping.write_unit,
            in_order=mapping.encodes_always,
            discard_alignment=mapping.discard_unit or self.allocation_unit,
        )

    @property
    def supports_compressed_writes(self) -> bool:
        return self.mapping.encoded_unit > 0 or self.mapping.stores_compressed_plain

    @property
    def fixed(self) -> bool:
        return self.mapping.fixed

    def info(self) -> NodeInfo:
        with self.lock:
            return self.mapping.info()

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        mapping: Mapping | None = getattr(self, "mapping", None)
        if mapping is not None:
            wanted = mapping.child_permissions(role, perm, shared, self.read_only)
            if wanted is not None:
                return wanted
        return super().child_permissions(role, perm, shared)

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        mapping = self.mapping
        with self.lock:
            token = self.pins.enter()
            try:
                places = mapping.locate(requests)
            except BaseException:
                self.pins.leave(token)
                raise
        try:
            if places is None or -1 in places:
                self.reader.read(requests)
                return
            self.children["file"].node.event("read_aio")
            node = mapping.data_node
            if len(places) == 1:
                node.readv([(places[0], requests[0][1])])
            else:
                node.readv(
                    [(place, request[1]) for place, request in zip(places, requests, strict=False)]
                )
        finally:
            self.pins.leave(token)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self.writer.write(requests)
        # Most writes have no flags, and operators of an enum are slow.
        if flags is not _NO_FLAGS and flags & WriteFlags.FUA:
            self.flush()

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        if self.mapping.encoded_unit:
            self.writer.write_compressed(requests)
        elif self.mapping.stores_compressed_plain:
            self.writer.write(requests)
        else:
            raise ImageUnsupported("Compression not supported for this file format")

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self.clearing.write_zeroes(offset, length, flags)
        if flags & WriteFlags.FUA:
            self.flush()

    def _discard(self, offset: int, length: int) -> None:
        self.clearing.discard(offset, length)

    def flush(self) -> None:
        """Metadata and data to the children and, unless the user said no_flush, to storage."""
        self.file.event("flush_to_os")
        if self.read_only:
            return
        metadata = self.metadata
        # Data and counts are made durable first, and without the lock: reads go on meanwhile.
        with self.lock:
            metadata.write_counts()
            generation = metadata.generation
        self._flush_children(generation)
        with self.lock:
            self.mapping.flush()
            if metadata.generation == generation:
                return
            generation = metadata.generation
        self._flush_children(generation)

    def _flush_children(self, generation: int) -> None:
        """Flush what was written up to this number."""
        if self.options.no_flush:
            return
        self.file.event("flush_to_disk")
        try:
            for role, attachment in self.children.items():
                if role != "backing":
                    attachment.node.flush()
        except BaseException:
            with self.lock:
                self.metadata.lost()
            raise
        with self.lock:
            self.metadata.settle(generation)

    def extents(self, offset: int, length: int) -> list[Extent]:
        with self.lock:
            return self.mapping.status(offset, length)

    def uses_more_than(self, length: int) -> bool:
        with self.lock:
            answer = self.mapping.uses_more_than(length)
        return super().uses_more_than(length) if answer is None else answer

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        pieces = self.mapping.columns(offset, length)
        while True:
            with self.lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        if size < self.size:
            # What is cut off must not come back when the disk grows again.
            self.clearing.erase(size, min(round_up(size, self.allocation_unit), self.size))
        old_size = self.size
        with self.exclusive():
            self.writer.open_gate()
            self.mapping.truncate(size, preallocation, exact=exact, zeroed=zeroed)
            self.metadata.relieve()
        if zeroed and self.backing is not None:
            self._cover(old_size, min(self.size, self.backing.size))

    def _cover(self, start: int, end: int) -> None:
        """Zeroes over what a longer backing file would show where the disk has grown."""
        for extent in self.extents(start, end - start) if start < end else ():
            if extent.kind is Kind.BELOW:
                self.clearing.write_zeroes(extent.guest_offset, extent.length, _NO_FLAGS)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other change is under way or begins: for work on the tables as a whole.

        Holds the lock, so reads wait as well. Changes of this disk by way of its node would wait
        for themselves; call this without holding the lock.
        """
        with self.lock:
            hold = self.ranges.acquire([(0, EVERYTHING)], writing=False)
            try:
                yield
            finally:
                self.units.forget()
                self.ranges.release(hold)

    def drain_reads(self) -> None:
        """Wait until no read that began before this is in flight: nobody looks at old places then.

        With the lock held, which others may have while this waits: tables are consistent now.
        """
        since = self.pins.now
        while self.pins.oldest < since:
            self._changed.wait(0.001)

    # -- VM state --------------------------------------------------------------------------------

    @property
    def vmstate_offset(self) -> int:
        return self.mapping.vmstate_offset

    def read_vmstate(self, offset: int, buffer: memoryview) -> None:
        self.file.event("vmstate_load")
        self.readv([(self._vmstate(offset), buffer)])

    def write_vmstate(self, offset: int, data: memoryview) -> None:
        self.file.event("vmstate_save")
        self.writev([(self._vmstate(offset), data)])

    def _vmstate(self, offset: int) -> int:
        base = self.mapping.vmstate_offset
        if not base:
            raise ImageUnsupported("Operation not supported")
        return base + offset

    # -- life ------------------------------------------------------------------------------------

    def reopen(self, *, read_only: bool) -> None:
        if read_only == self.read_only:
            return
        if read_only:
            self._finish()
        super().reopen(read_only=read_only)
        try:
            with self.lock:
                self.mapping.reopened(read_only=read_only)
        except BaseException:
            super().reopen(read_only=not read_only)
            raise

    def _finish(self) -> None:
        """Leave the image as one that nobody is writing to."""
        self.flush()
        with self.exclusive():
            self.mapping.close()
            self.writer.close_gate()
        self.flush()

    def _close(self) -> None:
        """The last flush. What fails is reported, not raised: whoever must know flushes before."""
        if self.read_only:
            return
        with self.lock:
            failures = self.metadata.close()
            if not failures:
                try:
                    self.mapping.close()
                except LaminaError as failure:
                    failures = [("image header", failure)]
                else:
                    failures = self.metadata.close()
        for name, error in failures:
            self.context.warn(f"error: Failed to flush the {name}: {error}")
        if not failures:
            # Whoever waits for data to be durable flushes, and is told; closing promises nothing.
            with suppress(LaminaError):
                self._flush_children(self.metadata.generation)


# -- for drivers, which are handed nodes ---------------------------------------------------------


def mapping_of(node: Node, kind: type[AnyMapping]) -> AnyMapping:
    """The mapping of an open image, whose driver knows of which kind it is."""
    assert isinstance(node, Disk)
    assert isinstance(node.mapping, kind)
    return node.mapping


@contextmanager
def exclusive(node: Node, kind: type[AnyMapping]) -> Iterator[AnyMapping]:
    """The mapping of an open image, while nobody else changes it."""
    mapping = mapping_of(node, kind)
    assert isinstance(node, Disk)
    with node.exclusive():
        yield mapping
