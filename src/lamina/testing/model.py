"""The model disk: a bytearray that any image has to agree with, driven by hypothesis.

A test names its image maker and gets a state machine:

    class Images(ImageMaker):
        def make(self, size, backing): …      # an open, writable node
        def reopen(self, node): …             # closed and opened again
        def check(self, node): …              # our check, QEMU's check, QEMU's compare

    TestModel = model_test(Images, size=1 << 20, unit=1 << 16)

Requests are drawn so that they meet at the edges of units, where mistakes live.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lamina.block.extents import Kind
from lamina.block.limits import WriteFlags
from lamina.block.node import Node
from lamina.hints import Any, ClassVar


class ImageMaker(ABC):
    """What the model needs to know about a format. One instance per run of the machine."""

    @abstractmethod
    def make(self, size: int, backing: bytes | None) -> Node:
        """A new writable disk of ``size`` bytes, on a backing file with this content."""

    @abstractmethod
    def reopen(self, node: Node) -> Node:
        """Close and open again."""

    def check(self, node: Node, content: bytes) -> None:
        """After a run, the node flushed and still open: raise if anything is wrong.

        ``content`` is what the disk reads as.
        """

    def finish(self, node: Node) -> None:
        """The end: close, and remove what was made."""
        node.close()


class DiskModel(RuleBasedStateMachine):
    """See the module's text; ``model_test`` makes subclasses of it."""

    maker_type: ClassVar[type[ImageMaker]]
    disk_size: ClassVar[int]
    unit: ClassVar[int]
    alignment: ClassVar[int]
    resizable: ClassVar[bool]
    backed: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.maker = self.maker_type()
        self.node: Node | None = None
        self.content = bytearray()

    @property
    def disk(self) -> Node:
        assert self.node is not None
        return self.node

    # -- drawing requests ------------------------------------------------------------------------

    def _range(self, data: Any, limit: int | None = None) -> tuple[int, int]:
        """Offset and length, near the edges of units more often than not."""
        size = len(self.content)
        step = self.alignment
        edges = st.integers(0, size // self.unit).map(lambda n: n * self.unit)
        near = st.tuples(edges, st.integers(-3, 3)).map(lambda pair: pair[0] + pair[1] * step)
        anywhere = st.integers(0, size // step).map(lambda n: n * step)
        point = st.one_of(edges, near, anywhere).map(lambda at: min(max(at, 0), size))
        first, second = data.draw(point), data.draw(point)
        start, end = min(first, second), max(first, second)
        if limit is not None:
            end = min(end, start + limit)
        return start, end - start

    # -- rules -----------------------------------------------------------------------------------

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        backing = None
        if self.backed and data.draw(st.booleans()):
            length = data.draw(st.sampled_from([self.disk_size, self.disk_size // 2]))
            backing = _pattern(data.draw(st.integers(1, 255)), length)
        self.node = self.maker.make(self.disk_size, backing)
        self.content = bytearray((backing or b"").ljust(self.disk_size, b"\0"))

    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data: Any, count: int) -> None:
        requests: list[tuple[int, bytes]] = []
        for _ in range(count):
            offset, length = self._range(data, 3 * self.unit)
            if all(offset + length <= at or at + len(old) <= offset for at, old in requests):
                requests.append((offset, _pattern(data.draw(st.integers(1, 255)), length)))
        self.disk.writev([(offset, memoryview(payload)) for offset, payload in requests])
        for offset, payload in requests:
            self.content[offset : offset + len(payload)] = payload

    @rule(data=st.data(), unmap=st.booleans())
    def zero(self, data: Any, unmap: bool) -> None:
        offset, length = self._range(data)
        self.disk.write_zeroes(
            offset, length, WriteFlags.MAY_UNMAP if unmap else WriteFlags.NONE
        )
        self.content[offset : offset + length] = bytes(length)

    @rule(data=st.data())
    def discard(self, data: Any) -> None:
        """Afterwards the range reads as zeroes, or as it did: whole units have one fate."""
        offset, length = self._range(data)
        self.disk.discard(offset, length)
        found = self.disk.read(offset, length)
        for start in range(offset, offset + length, self.alignment):
            part = slice(start, min(start + self.alignment, offset + length))
            now = found[part.start - offset : part.stop - offset]
            assert now in (bytes(len(now)), self.content[part])
        self.content[offset : offset + length] = found

    @precondition(lambda self: self.node is not None and self.node.supports_compressed_writes)
    @rule(data=st.data())
    def write_compressed(self, data: Any) -> None:
        units = -(-len(self.content) // self.unit)
        first = data.draw(st.integers(0, units - 1))
        start = first * self.unit
        count = data.draw(st.integers(1, 3))
        end = min(start + count * self.unit, len(self.content))
        payload = _pattern(data.draw(st.integers(1, 255)), end - start)
        self.disk.write_compressed([(start, memoryview(payload))])
        self.content[start:end] = payload

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule()
    def reopen(self) -> None:
        self.node = self.maker.reopen(self.disk)

    @precondition(lambda self: self.resizable)
    @rule(data=st.data())
    def grow(self, data: Any) -> None:
        size = len(self.content) + self.alignment * data.draw(st.integers(0, 300))
        size = min(size, 2 * self.disk_size)
        if size > len(self.content):
            self.disk.truncate(size, zeroed=True)
            self.content.extend(bytes(size - len(self.content)))

    @rule(data=st.data(), count=st.integers(1, 4))
    def read(self, data: Any, count: int) -> None:
        ranges = [self._range(data) for _ in range(count)]
        buffers = [bytearray(b"\xaa") * length for _, length in ranges]
        self.disk.readv(
            [
                (offset, memoryview(buffer))
                for (offset, _), buffer in zip(ranges, buffers, strict=True)
            ]
        )
        for (offset, length), buffer in zip(ranges, buffers, strict=True):
            assert buffer == self.content[offset : offset + length], f"{length} bytes at {offset}"

    @invariant()
    def extents_tell_the_truth(self) -> None:
        if self.node is None:
            return
        assert self.disk.size == len(self.content)
        at = 0
        for extent in self.disk.extents(0, len(self.content)):
            assert extent.guest_offset == at, "extents have a gap"
            assert extent.length > 0
            if extent.kind == Kind.ZERO:
                assert not any(self.content[at : extent.end]), f"not zero: {extent}"
            at = extent.end
        assert at == len(self.content)

    def teardown(self) -> None:
        if self.node is None:
            return
        assert self.disk.read(0, len(self.content)) == self.content
        self.disk.flush()
        self.maker.check(self.disk, bytes(self.content))
        self.maker.finish(self.disk)


def _pattern(seed: int, length: int) -> bytes:
    """Bytes that tell where they were meant to be; compressible; never all zero."""
    block = bytes((seed + place // 16) % 255 + 1 for place in range(4096))
    marked = b"".join(
        number.to_bytes(4, "little") + block[4:] for number in range(-(-length // 4096))
    )
    return marked[:length]


def model_test(
    maker: type[ImageMaker],
    *,
    size: int,
    unit: int,
    alignment: int = 1,
    resizable: bool = True,
    backed: bool = True,
    examples: int = 30,
    steps: int = 30,
) -> Any:
    """A ``TestCase`` for pytest. ``unit``: of allocation; ``alignment``: of requests. Bytes."""
    machine = type(
        f"{maker.__name__}Model",
        (DiskModel,),
        {
            "maker_type": maker,
            "disk_size": size,
            "unit": unit,
            "alignment": alignment,
            "resizable": resizable,
            "backed": backed,
        },
    )
    case = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case
