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

``cut.verify`` knows what the guest may expect: what was flushed is there, byte for byte, except
where later requests were under way; those bytes are old or new, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import NodeOptions, WriteRequest
from lamina.hints import TYPE_CHECKING, NamedTuple
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
    """Which of the files that share the journal."""


class Flush:
    """Another kind of entry: what was written to this file before is durable."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __bool__(self) -> bool:
        return False


class CrashFile(MemoryFile):
    """A memory file that records what reaches storage, and when it was flushed."""

    def __init__(
        self,
        content: bytes = b"",
        *,
        number: int = 0,
        journal: list[Step | Flush] | None = None,
        options: NodeOptions | None = None,
    ) -> None:
        """Several files may share a ``journal``, each under a ``number`` of its own."""
        super().__init__(
            content, options or NodeOptions(read_only=False, unmap=True, filename="memory")
        )
        self.number = number
        self.beside: CrashFile | None = None
        """The second file of an image of two."""
        self.journal: list[Step | Flush] = [] if journal is None else journal

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
    """One possible state of the file, or files."""

    at: int
    """So many entries of the journal had begun."""
    outcome: str
    contents: list[bytes]
    guest: GuestLog

    @property
    def content(self) -> bytes:
        """Of the first file."""
        return self.contents[0]

    @property
    def beside(self) -> bytes:
        """Of the second file."""
        return self.contents[1]

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

    def work(files: list[CrashFile], guest: GuestLog) -> None:
        files[0].beside = files[1] if len(files) > 1 else None
        workload(files[0], guest)

    yield from power_cuts_of_files(
        work,
        initial=[initial] if beside is None else [initial, beside],
        guest_content=guest_content,
        seed=seed,
        subsets=subsets,
    )


def power_cuts_of_files(
    workload: Callable[[list[CrashFile], GuestLog], None],
    *,
    initial: Sequence[bytes],
    guest_content: bytes,
    seed: int = 0,
    subsets: int = 2,
) -> Iterator[PowerCut]:
    """The same for an image of several files: a flush of one says nothing of the others."""
    journal: list[Step | Flush] = []
    files = [
        CrashFile(content, number=number, journal=journal)
        for number, content in enumerate(initial)
    ]
    guest = GuestLog(files[0], guest_content)
    workload(files, guest)
    rng = random.Random(seed)
    durable = [bytearray(content) for content in initial]
    pending: list[Step] = []
    everything = [Flush(number) for number in range(len(files))]
    for at, entry in enumerate([*journal, *everything]):
        if isinstance(entry, Flush):
            for outcome, steps in _outcomes(pending, rng, subsets):
                yield PowerCut(at, outcome, _apply(durable, steps), guest)
            for step in pending:
                if step.file == entry.file:
                    _carry_out(durable[step.file], step)
            pending = [step for step in pending if step.file != entry.file]
            continue
        pending.append(entry)
        # Dropping everything is the same state until the next flush.
        for outcome, steps in _outcomes(pending, rng, subsets if len(pending) > 1 else 0):
            if outcome != "nothing kept":
                yield PowerCut(at + 1, outcome, _apply(durable, steps), guest)


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
            data = step.data[start - step.offset : stop - step.offset]
            parts.append(Step(start, data, step.file))
        start = stop
    return parts


def _apply(durable: Sequence[bytearray], steps: Sequence[Step]) -> list[bytes]:
    contents = [bytearray(content) for content in durable]
    for step in steps:
        _carry_out(contents[step.file], step)
    return [bytes(content) for content in contents]


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
