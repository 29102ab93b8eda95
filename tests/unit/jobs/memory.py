"""A disk in memory with allocation units and a backing file: what jobs need, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.errors import StorageError


class MemoryDisk(Node):
    driver = "memory"
    is_format = True

    def __init__(
        self,
        size: int,
        *,
        unit: int = 4096,
        backing: Node | None = None,
        file_offset: int | None = None,
        file: Node | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(NodeOptions(read_only=read_only))
        self.data = bytearray(size)
        self.unit = unit
        self.state = [Kind.BELOW] * (-(-size // unit))
        self.writes: list[tuple[int, int]] = []
        self.fail_read_at: int | None = None
        self.fail_write_at: int | None = None
        self.flushes = 0
        if file is not None:
            self.attach("file", file)
        self.file_offset = file_offset
        if backing is not None:
            self.attach("backing", backing)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def limits(self) -> Limits:
        return Limits(write_zeroes_alignment=self.unit)

    def info(self) -> NodeInfo:
        return NodeInfo("memory", "memory", self.size, cluster_size=self.unit)

    def fill(self, offset: int, data: bytes) -> None:
        """What was there before the test began: whole units."""
        self.data[offset : offset + len(data)] = data
        self._mark(offset, len(data), Kind.DATA)

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)
        self._mark(offset, length, Kind.ZERO)

    def _mark(self, offset: int, length: int, kind: Kind) -> None:
        for number in range(offset // self.unit, -(-(offset + length) // self.unit)):
            self.state[number] = kind

    def content(self) -> bytes:
        return self.read(0, self.size)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            if self.fail_read_at is not None and (
                offset <= self.fail_read_at < offset + len(buffer)
            ):
                raise StorageError.from_errno(5)
            for extent in self.extents(offset, len(buffer)):
                part = buffer[extent.guest_offset - offset : extent.end - offset]
                if extent.kind == Kind.BELOW:
                    below = self.backing
                    inside = 0
                    if below is not None:
                        inside = max(min(extent.end, below.size) - extent.guest_offset, 0)
                        if inside:
                            below.readv([(extent.guest_offset, part[:inside])])
                    part[inside:] = bytes(len(part) - inside)
                else:
                    part[:] = self.data[extent.guest_offset : extent.end]

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        for offset, data in requests:
            length = len(data)
            if self.fail_write_at is not None and offset <= self.fail_write_at < offset + length:
                raise StorageError.from_errno(28)
            assert offset >= 0
            assert offset + length <= self.size
            self.writes.append((offset, length))
            self._copy_up(offset, length)
            self.data[offset : offset + length] = data
            self._mark(offset, length, Kind.DATA)

    def _copy_up(self, offset: int, length: int) -> None:
        for number in range(offset // self.unit, -(-(offset + length) // self.unit)):
            if self.state[number] == Kind.BELOW:
                start = number * self.unit
                stop = min(start + self.unit, self.size)
                self.data[start:stop] = self.read(start, stop - start)

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        for start in range(offset, offset + length):
            if start % self.unit == 0 and start + self.unit <= offset + length:
                self.zero(start, self.unit)
        self.writes.append((offset, length))
        self._copy_up(offset, length)
        self.data[offset : offset + length] = bytes(length)
        for number in range(offset // self.unit, -(-(offset + length) // self.unit)):
            if self.state[number] == Kind.BELOW:
                self.state[number] = Kind.DATA

    def _flush(self) -> None:
        self.flushes += 1

    def extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            number = offset // self.unit
            stop = min((number + 1) * self.unit, end)
            kind = self.state[number]
            host = -1
            if kind == Kind.DATA:
                host = offset + (self.file_offset or 0)
            if found and found[-1].kind == kind:
                last = found[-1]
                found[-1] = last._replace(length=last.length + stop - offset)
            else:
                node = self.child("file") if kind == Kind.DATA else None
                found.append(Extent(offset, stop - offset, kind, node, host))
            offset = stop
        return found

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        units = -(-size // self.unit)
        del self.state[units:]
        self.state.extend([Kind.ZERO if zeroed else Kind.BELOW] * (units - len(self.state)))


class SparseFile(MemoryDisk):
    """A protocol with holes."""

    driver = "sparse"
    is_format = False

    def info(self) -> NodeInfo:
        present = sum(kind == Kind.DATA for kind in self.state) * self.unit
        return NodeInfo("sparse", "sparse", self.size, actual_size=present)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [
            extent._replace(
                kind=Kind.DATA if extent.kind == Kind.DATA else Kind.ZERO,
                node=self,
                host_offset=extent.guest_offset,
            )
            for extent in super().extents(offset, length)
        ]


def use(node: Node, perm: Perm = Perm.ALL) -> Node:
    node.used_by(None, "test", perm, Perm.ALL)
    return node
