"""A node that hands everything on to its ``file``: filters override what they change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent
from lamina.block.info import NodeInfo
from lamina.block.limits import Limits, Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest


class FilterNode(Node):
    is_filter = True

    def __init__(self, options: NodeOptions, file: Node) -> None:
        super().__init__(options)
        self.attach("file", file)

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def limits(self) -> Limits:
        return self.file.limits

    @property
    def supports_compressed_writes(self) -> bool:
        return self.file.supports_compressed_writes

    def info(self) -> NodeInfo:
        below = self.file.info()
        return NodeInfo(self.filename, self.driver, self.size, below.actual_size)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self.file.readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self.file.writev(requests, flags)

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        self.file.write_compressed(requests)

    def write_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        self.file.write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        self.file.discard(offset, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return self.file.extents(offset, length)

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        return self.file.columns(offset, length)

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        self.file.truncate(size, preallocation, exact=exact, zeroed=zeroed)

    def read_vmstate(self, offset: int, buffer: memoryview) -> None:
        self.file.read_vmstate(offset, buffer)

    def write_vmstate(self, offset: int, data: memoryview) -> None:
        self.file.write_vmstate(offset, data)

    def event(self, name: str) -> None:
        self.file.event(name)
