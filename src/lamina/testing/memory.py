"""Storage in memory, with a way to make any request fail or wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest

Hook = Callable[[str, int, int], None]
"""Called with the kind of a request (read, write, zero, discard, truncate, flush), its offset and
its length before it is carried out; may raise, or wait."""


class MemoryFile(Node):
    """A protocol: grows when written behind its end, and reads as zeroes there."""

    driver = "memory"

    def __init__(
        self, content: bytes | bytearray = b"", options: NodeOptions | None = None
    ) -> None:
        super().__init__(options or NodeOptions(read_only=False, filename="memory"))
        self.content = bytearray(content)
        self.hook: Hook | None = None
        self.events: list[str] = []
        """What formats announced."""
        self.on_event: Callable[[str], None] | None = None
        self.calls: list[str] = []
        """The kind of every call, a batch counting once."""
        self._guard = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.content)

    def info(self) -> NodeInfo:
        return NodeInfo(self.filename, self.driver, self.size, self.size)

    def _before(self, kind: str, offset: int, length: int) -> None:
        if self.hook is not None:
            self.hook(kind, offset, length)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        self.calls.append("read")
        for offset, buffer in requests:
            self._before("read", offset, len(buffer))
            with self._guard:
                found = self.content[offset : offset + len(buffer)]
            buffer[:] = found.ljust(len(buffer), b"\0")

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self.calls.append("write")
        for offset, data in requests:
            self._before("write", offset, len(data))
            with self._guard:
                self._store(offset, data)
        if flags & WriteFlags.FUA:
            self.flush()

    def _store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[offset:end] = data

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self.calls.append("zero")
        self._before("zero", offset, length)
        with self._guard:
            self._store(offset, bytes(length))

    def _discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")
        self._before("discard", offset, length)
        with self._guard:
            inside = max(min(length, len(self.content) - offset), 0)
            self._store(offset, bytes(inside))

    def _flush(self) -> None:
        self.calls.append("flush")
        self._before("flush", 0, 0)

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        self.calls.append("truncate")
        self._before("truncate", size, 0)
        with self._guard:
            if size < len(self.content):
                del self.content[size:]
            else:
                self.content.extend(bytes(size - len(self.content)))

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA, self, offset)]

    def event(self, name: str) -> None:
        self.events.append(name)
        if self.on_event is not None:
            self.on_event(name)

    def reopen(self, *, read_only: bool) -> None:
        self.read_only = read_only
        self.refresh_permissions()

    def _close(self) -> None:
        pass
