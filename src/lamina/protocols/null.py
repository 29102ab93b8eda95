"""null-co and null-aio: storage that swallows everything and holds nothing, for measuring.

Both names mean the same here; QEMU's differ in how they wait.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lamina.block.driver import Driver
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.options import Type, option
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.units import GIB

if TYPE_CHECKING:
    from lamina.block.context import OpenContext

_ZEROES = bytes(1 << 16)


@dataclass(frozen=True)
class NullOptions:
    filename: str = option("filename", help="null-co:// or null-aio://")
    size: int = option("size", Type.SIZE, GIB, "size of the null block")
    latency: int = option("latency-ns", Type.NUMBER, 0, "nanoseconds before a request completes")
    read_zeroes: bool = option("read-zeroes", Type.BOOL, False, "report the disk as zeroes")


class NullNode(Node):
    """Reads as zeroes whatever was written."""

    def __init__(self, driver: str, node_options: NodeOptions, options: NullOptions) -> None:
        super().__init__(node_options)
        self.driver = driver  # type: ignore[misc]
        self._size = options.size
        self._delay = options.latency / 1e9
        self._known_zero = options.read_zeroes

    @property
    def size(self) -> int:
        return self._size

    def info(self) -> NodeInfo:
        return NodeInfo(self.filename, self.driver, self._size, 0, dirty=None)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self._wait()
        for _, buffer in requests:
            for start in range(0, len(buffer), len(_ZEROES)):
                part = buffer[start : start + len(_ZEROES)]
                part[:] = _ZEROES[: len(part)]

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self._wait()

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self._wait()

    def _flush(self) -> None:
        self._wait()

    def _wait(self) -> None:
        if self._delay:
            time.sleep(self._delay)

    def extents(self, offset: int, length: int) -> list[Extent]:
        kind = Kind.ZERO if self._known_zero else Kind.DATA
        return [Extent(offset, length, kind, self, offset)]

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        self._size = size


class NullDriver(Driver):
    Options = NullOptions
    strong_options = ("size", "read-zeroes")

    def __init__(self, name: str) -> None:
        self.name = name

    def parse_filename(self, filename: str) -> dict[str, Any]:
        if filename != f"{self.name}://":
            raise UsageError(f"The only allowed filename for this driver is '{self.name}://'")
        return {}

    def plain_filename(self, given: Mapping[str, Any]) -> str | None:
        return None if given else f"{self.name}://"

    def open(self, options: NullOptions, context: OpenContext) -> Node:
        if options.latency < 0:
            raise UsageError("latency-ns is invalid")
        return NullNode(self.name, context.node_options, options)


DRIVER = NullDriver("null-co")
AIO_DRIVER = NullDriver("null-aio")
