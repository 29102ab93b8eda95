"""compress: every write becomes a compressed one.

The image below takes compressed writes in whole clusters only, so smaller requests read the rest of
their clusters first.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.alignment import Aligner
from lamina.block.driver import Driver, NoOptions
from lamina.block.filter import FilterNode
from lamina.block.limits import Limits, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.context import OpenContext


class CompressNode(FilterNode):
    driver = "compress"

    def __init__(self, options: NodeOptions, file: Node) -> None:
        super().__init__(options, file)
        self._aligner = Aligner(self)

    @property
    def limits(self) -> Limits:
        below = self.file.limits
        return replace(below, request_alignment=max(below.write_zeroes_alignment, 1))

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self.file.readv(requests)

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self._aligner.writev(requests, flags)

    # -- what the aligner makes of requests ------------------------------------------------------

    def aligned_readv(self, requests: Sequence[ReadRequest]) -> None:
        """The last cluster may reach behind the end of the disk."""
        size = self.size
        inside = []
        for offset, buffer in requests:
            room = max(min(len(buffer), size - offset), 0)
            buffer[room:] = bytes(len(buffer) - room)
            inside.append((offset, buffer[:room]))
        self.file.readv(inside)

    def aligned_writev(self, requests: Sequence[WriteRequest], flags: WriteFlags) -> None:
        size = self.size
        self.file.write_compressed(
            [(offset, memoryview(data)[: size - offset]) for offset, data in requests]
        )
        if flags & WriteFlags.FUA:
            self.flush()

    def aligned_write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self.file.write_zeroes(offset, length, flags)

    def aligned_discard(self, offset: int, length: int) -> None:
        self.file.discard(offset, length)


class CompressDriver(Driver):
    name = "compress"
    Options = NoOptions

    def open(self, options: NoOptions, context: OpenContext) -> Node:
        file = context.open_child("file")
        if not file.supports_compressed_writes and not context.inspect:
            raise ImageUnsupported(
                f"Compression is not supported for underlying format: {file.driver}"
            )
        return CompressNode(context.node_options, file)


DRIVER = CompressDriver()
