"""The node: everything passes through, past the rules and within the limits that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lamina.block.alignment import Aligner, check_resizable
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.filters.blkdebug.naming import name_of
from lamina.filters.blkdebug.rules import Rules
from lamina.hints import Any


class BlkdebugNode(Node):
    driver = "blkdebug"
    is_filter = True

    def __init__(
        self,
        options: NodeOptions,
        image: Node,
        rules: Rules,
        limits: Limits,
        *,
        taken: Perm,
        unshared: Perm,
        given: Mapping[str, Any],
    ) -> None:
        """``taken`` and ``unshared``: permissions on ``image`` beyond what the users need;
        ``given``: the options as the user wrote them, for the name to show."""
        super().__init__(options)
        self.rules = rules
        self._limits = limits
        self._taken = taken
        self._unshared = unshared
        self._given = given
        self._aligner = Aligner(self)
        self._unflushed = False
        self.attach("image", image)
        self.event("none")

    # -- what it is ------------------------------------------------------------------------------

    @property
    def file(self) -> Node:
        return self.children["image"].node

    @property
    def filename(self) -> str:
        return name_of(self.file, self._given)

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def supports_compressed_writes(self) -> bool:
        return self.file.supports_compressed_writes

    def info(self) -> NodeInfo:
        return NodeInfo(filename=self.filename, format=self.driver, virtual_size=self.size)

    # -- rules -----------------------------------------------------------------------------------

    def event(self, name: str) -> None:
        self.rules.happen(name)

    def set_breakpoint(self, event: str, tag: str) -> None:
        """See ``Rules``, here and below."""
        self.rules.set_breakpoint(event, tag)

    def remove_breakpoint(self, tag: str) -> None:
        self.rules.remove_breakpoint(tag)

    def resume(self, tag: str) -> None:
        self.rules.resume(tag)

    def resume_all(self) -> None:
        self.rules.resume_all()

    def is_suspended(self, tag: str) -> bool:
        return self.rules.is_suspended(tag)

    def wait_suspended(self, tag: str, timeout: float | None = None) -> bool:
        return self.rules.wait_suspended(tag, timeout)

    # -- data ------------------------------------------------------------------------------------

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self._aligner.readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self._unflushed = True
        self._aligner.writev(requests, flags)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        self._unflushed = True
        self._aligner.write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        self._unflushed = True
        self._aligner.discard(offset, length)

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            self.rules.check("read", offset, len(buffer))
            self.file.readv([(offset, buffer)])

    def aligned_writev(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        for offset, data in requests:
            self.rules.check("write", offset, len(data))
            self.file.writev([(offset, data)], flags)

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self.rules.check("write-zeroes", offset, length)
        self.file.write_zeroes(offset, length, flags)

    def aligned_discard(self, offset: int, length: int) -> None:
        self.rules.check("discard", offset, length)
        self.file.discard(offset, length)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        self._unflushed = True
        for offset, data in requests:
            self.rules.check("write", offset, len(data))
        self.file.write_compressed(requests)

    def _flush(self) -> None:
        if self._unflushed:  # else nothing has to reach storage, and nothing can fail
            self.rules.check("flush", 0, 0)
            self.file.flush()
            self._unflushed = False

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Data is told as lying here, so that whoever fetches it meets the rules as well."""
        self.rules.check("block-status", offset, length)
        return [self._here(one) for one in self.file.extents(offset, length)]

    def _here(self, extent: Extent) -> Extent:
        at, length, kind = extent.guest_offset, extent.length, extent.kind
        if kind is Kind.BELOW or (kind is Kind.ZERO and extent.host_offset < 0):
            return Extent(at, length, kind)
        return Extent(at, length, Kind.ZERO if kind is Kind.ZERO else Kind.DATA, self, at)

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        self._unflushed = True
        self.file.truncate(size, preallocation, exact=exact, zeroed=zeroed)

    # -- life ------------------------------------------------------------------------------------

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return perm | self._taken, shared & ~self._unshared

    def apply_permissions(self, perm: Perm, shared: Perm) -> None:
        check_resizable(self, perm)

    def _close(self) -> None:
        self.rules.resume_all()
