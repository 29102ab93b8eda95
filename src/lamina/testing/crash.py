"""The crash disk: what a file may hold after the power was cut, at every moment of a workload.

``CrashFile`` keeps a journal of everything that reaches storage. Between two flushes a real disk
may have carried out any part of the writes in any order, so each cut has several outcomes: nothing
since the flush, everything, everything with the last write torn, and random subsets with writes
torn between sectors. ``power_cuts`` plays them all:

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_disk(file)
        guest.write(disk, 0, b"…")
        guest.flush(disk)

    for cut in power_cuts(workload, initial=image):
        disk = open_disk(MemoryFile(cut.content))
        cut.verify(disk.read(0, disk.size))

An image of two files has a ``CrashFile`` ``beside`` the other: one journal, a flush for each.

``cut.verify`` knows what the guest may expect: what was flushed is there, byte for byte, except
where later requests were under way; those bytes are old or new, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import NodeOptions, WriteRequest
from lamina.testing.memory import MemoryFile

if TYPE_CHECKING:
    from lamina.block.node import Node

SECTOR = 512
"""Bytes that storage writes as a whole or not at all."""


class Step(NamedTuple):
    """One entry of the journal: a write, or a change of length (``data`` is None)."""

    offset: int
    """Of the write; or the new length."""
    data: bytes | None
    file: int = 0
    """Which file: 1 is the one beside the first."""


class Flush:
    """The other kind of entry: what was written to this file before is durable."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __bool__(self) -> bool:
        return False


class CrashFile(MemoryFile):
    """A memory file that records what reaches storage, and when it was flushed."""

    def __init__(self, content: bytes = b"", *, main: CrashFile | None = None) -> None:
        """``main``: the file that this one lies beside."""
        super().__init__(content, NodeOptions(read_only=False, unmap=True, filename="memory"))
        self.journal: list[Step | Flush] = [] if main is None else main.journal
        self.number = 0 if main is None else 1
        self.beside: CrashFile | None = None
        if main is not None:
            main.beside = self

    def _store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super()._store(offset, data)
        self.journal.append(Step(offset, bytes(data), self.number))

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        super().truncate(size, preallocation, exact=exact, zeroed=zeroed)
        self.journal.append(Step(size, None, self.number))

    def _flush(self) -> None:
        super()._flush()
        self.journal.append(Flush(self.number))


class GuestOperation(NamedTuple):
    offset: int
    data: bytes
    started: int
    """Length of the journal when it began."""


class GuestLog:
    """What a guest did to a disk, told while it does it."""

    def __init__(self, file: CrashFile, content: bytes) -> None:
        self._file = file
        self.content = bytearray(content)
        """What the disk reads as now."""
        self.operations: list[GuestOperation] = []
        self.flushed: list[tuple[int, int, bytes]] = [(0, 0, bytes(content))]
        """For each flush: length of the journal when it was done, operations before it, content."""

    def _begin(self, offset: int, data: bytes) -> None:
        self.operations.append(GuestOperation(offset, data, len(self._file.journal)))

    def _end(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def write(self, disk: Node, offset: int, data: bytes) -> None:
        self.writev(disk, [(offset, data)])

    def writev(self, disk: Node, requests: Sequence[WriteRequest]) -> None:
        for offset, data in requests:
            self._begin(offset, bytes(data))
        disk.writev([(offset, memoryview(data)) for offset, data in requests])
        for offset, data in requests:
            self._end(offset, bytes(data))

    def write_compressed(self, disk: Node, offset: int, data: bytes) -> None:
        self._begin(offset, data)
        disk.write_compressed([(offset, memoryview(data))])
        self._end(offset, data)

    def write_zeroes(
        self, disk: Node, offset: int, length: int, flags: WriteFlags = WriteFlags.MAY_UNMAP
    ) -> None:
        self._begin(offset, bytes(length))
        disk.write_zeroes(offset, length, flags)
        self._end(offset, bytes(length))

    def discard(self, disk: Node, offset: int, length: int) -> None:
        self._begin(offset, bytes(length))
        disk.discard(offset, length)
        self._end(offset, disk.read(offset, length))

    def flush(self, disk: Node) -> None:
        disk.flush()
        self.flushed.append((len(self._file.journal), len(self.operations), bytes(self.content)))


class PowerCut(NamedTuple):
    """One possible state of the file."""

    at: int
    """So many entries of the journal had begun."""
    outcome: str
    content: bytes
    guest: GuestLog
    beside: bytes = b""
    """The content of the second file."""

    def verify(self, found: bytes) -> None:
        """``found``, the guest's disk as it reads now, is allowed. Raises AssertionError."""
        import numpy as np

        _, done, content = [entry for entry in self.guest.flushed if entry[0] <= self.at][-1]
        actual = np.frombuffer(found, dtype=np.uint8)
        flushed = np.frombuffer(content, dtype=np.uint8)
        assert len(actual) == len(flushed), f"{self}: {len(actual)} bytes, not {len(flushed)}"
        allowed = actual == flushed
        for operation in self.guest.operations[done:]:
            if operation.started > self.at:
                break
            span = slice(operation.offset, operation.offset + len(operation.data))
            allowed[span] |= actual[span] == np.frombuffer(operation.data, dtype=np.uint8)
        if not allowed.all():
            wrong = int(np.argmin(allowed))
            raise AssertionError(
                f"{self}: byte {wrong} is {actual[wrong]}, flushed as {flushed[wrong]}; "
                f"{int((~allowed).sum())} bytes are neither old nor new"
            )

    def __str__(self) -> str:
        return f"power cut after {self.at} writes, {self.outcome}"


def power_cuts(
    workload: Callable[[CrashFile, GuestLog], None],
    *,
    initial: bytes,
    guest_content: bytes,
    seed: int = 0,
    subsets: int = 2,
    beside: bytes | None = None,
) -> Iterator[PowerCut]:
    """Run ``workload`` once, then yield every state in which a power cut may leave the file.

    ``initial`` is the file before, ``guest_content`` what the disk in it reads as; ``subsets`` is
    how many random outcomes each moment gets beside the systematic ones. ``beside``: the content of
    a second file, which the workload finds as ``file.beside``.
    """
    file = CrashFile(initial)
    if beside is not None:
        CrashFile(beside, main=file)
    guest = GuestLog(file, guest_content)
    workload(file, guest)
    rng = random.Random(seed)
    durable = (bytearray(initial), bytearray(beside or b""))
    pending: list[Step] = []

    def cut(at: int, outcome: str, steps: Sequence[Step]) -> PowerCut:
        content, other = _apply(durable, steps)
        return PowerCut(at, outcome, content, guest, other)

    for at, entry in enumerate([*file.journal, Flush(0)]):
        if isinstance(entry, Flush):
            for outcome, steps in _outcomes(pending, rng, subsets):
                yield cut(at, outcome, steps)
            for step in pending:
                if step.file == entry.file:
                    _carry_out(durable[step.file], step)
            pending = [step for step in pending if step.file != entry.file]
            continue
        pending.append(entry)
        # Dropping everything is the same state until the next flush.
        for outcome, steps in _outcomes(pending, rng, subsets if len(pending) > 1 else 0):
            if outcome != "nothing kept":
                yield cut(at + 1, outcome, steps)


def _outcomes(
    pending: list[Step], rng: random.Random, subsets: int
) -> Iterator[tuple[str, list[Step]]]:
    yield "nothing kept", []
    if not pending:
        return
    yield "everything kept", pending
    yield "the last one torn", [*pending[:-1], *_torn(pending[-1], rng)]
    if len(pending) > 1:
        yield "only the last one kept", pending[-1:]
    for number in range(subsets):
        # What is kept keeps its order: a disk's cache has one copy of a sector. Since any part may
        # be missing, that covers all orders in which the writes could have been carried out.
        kept: list[Step] = []
        for step in pending:
            fate = rng.random()
            if fate < 0.4:
                kept.append(step)
            elif fate < 0.7:
                kept += _torn(step, rng)
        yield f"random part {number}", kept


def _torn(step: Step, rng: random.Random) -> list[Step]:
    """A random part of the sectors of a write."""
    if step.data is None:
        return []
    parts: list[Step] = []
    start = step.offset
    end = step.offset + len(step.data)
    while start < end:
        stop = min(start // SECTOR * SECTOR + SECTOR, end)
        if rng.random() < 0.5:
            part = step.data[start - step.offset : stop - step.offset]
            parts.append(Step(start, part, step.file))
        start = stop
    return parts


def _apply(durable: tuple[bytearray, bytearray], steps: Sequence[Step]) -> tuple[bytes, bytes]:
    contents = (bytearray(durable[0]), bytearray(durable[1]))
    for step in steps:
        _carry_out(contents[step.file], step)
    return bytes(contents[0]), bytes(contents[1])


def _carry_out(content: bytearray, step: Step) -> None:
    if step.data is None:
        if step.offset < len(content):
            del content[step.offset :]
        else:
            content.extend(bytes(step.offset - len(content)))
        return
    end = step.offset + len(step.data)
    if end > len(content):
        content.extend(bytes(end - len(content)))
    content[step.offset : end] = step.data
