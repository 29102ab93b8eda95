"""Metadata on its way to storage: ordering edges stated once, for all formats.

A change of a format's tables is several writes that must not reach the disk in the wrong order. A
format says for each write which *stage* it belongs to; ``commit`` writes the stages in order with a
flush of the file between them:

    COUNTS       space is taken: refcounts up, allocation bitmaps, new tables of such
    COUNT_ROOTS  what names the tables of counts: entries of a refcount table, its place
    TABLES       tables whose entries name data (the data itself was written before)
    ROOTS        what names the tables: upper tables, header fields
    FREES        space is given back: refcounts down

A crash between any two writes then leaves at most space that nobody names.

Two more edges follow from the same order. Data is written to storage before the tables that name
it: the flush in front of TABLES covers it, which is why the engine reports data with
``data_written``. And space that lost its last name may be given away, punched out or counted down
only once nobody can still find it, after a crash or with a read in flight: ``when_durable`` calls
back when that is so, just before FREES is written. Counts therefore go down inside such a callback,
never earlier: a block of counts may be written for the sake of another entry at any time.

A format that keeps a log has one edge more: each group of writes is in the log, durably, before it
goes to its places (``WriteAheadLog``). That makes groups atomic; the stages stay as they are.

Everything here happens under the disk's lock. A flush that fails may have lost what was written
since the one before it, so writes count as dirty again until a flush has succeeded: a commit that
raised can be repeated.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from lamina.engine.locks import Pins
from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from lamina.block.node import Node, WriteRequest


class Stage(enum.IntEnum):
    COUNTS = 0
    COUNT_ROOTS = 1
    TABLES = 2
    ROOTS = 3
    FREES = 4


COUNTING = (Stage.COUNTS, Stage.COUNT_ROOTS, Stage.FREES)
"""What lazy counting leaves for later."""


class DirtyWrite(NamedTuple):
    host_offset: int
    data: bytes | bytearray | memoryview
    event: str
    """What the file is told before it is written (``Node.event``)."""
    node: Node | None = None
    """Which file of an image that has several; None: the one that all images have."""


class Source(Protocol):
    """Somebody who keeps dirty metadata until it is collected, such as a cache of tables."""

    name: str
    """For the report of a failed close: "L2 table cache"; "" is not reported."""

    @property
    def dirty_bytes(self) -> int:
        """Bytes that the next commit would write."""

    def collect(self, stage: Stage) -> list[DirtyWrite]:
        """What is dirty in this stage."""

    def written(self, stage: Stage, generation: int) -> None:
        """What ``collect`` returned has been written, in the write of this number."""

    def settled(self, generation: int) -> None:
        """The writes up to this number are durable."""

    def lost(self) -> None:
        """A flush failed: what has been written but is not settled is dirty again."""


class WriteAheadLog(Protocol):
    """Makes groups of writes happen as a whole: what is in the log is carried out after a crash."""

    def groups(self, writes: Sequence[DirtyWrite]) -> Iterable[list[DirtyWrite]]:
        """The writes, in order, in groups that it can take at once."""

    def append(self, writes: Sequence[DirtyWrite]) -> None:
        """Add a group. All groups before it are carried out and durable: they can be forgotten."""


class Metadata:
    """The dirty metadata of one image, and the order in which it is written.

    An image may keep its tables in several files: a stage is written to all of them, and the flush
    between two stages is one of every file that was written.
    """

    def __init__(self, file: Node, *, limit: int = 8 << 20) -> None:
        """``limit``: dirty bytes that ``relieve`` tolerates."""
        self.file = file
        self.limit = limit
        self.lazy_counts = False
        """While set, commits leave COUNTS, COUNT_ROOTS and FREES for later (``commit(True)``): the
        format has marked the image so that the counts are rebuilt after a crash."""
        self.log: WriteAheadLog | None = None
        """Where writes are made durable before they go to their places."""
        self.pins = Pins()
        """Reads in flight; the disk puts its own here."""
        self._puts: dict[Node, Puts] = {file: Puts()}
        self.sources: list[Source] = [self._puts[file]]
        self._callbacks: list[tuple[int, Callable[[], None]]] = []
        self._generation = 0
        self._unflushed: dict[int, Node] = {}

    # -- changes ---------------------------------------------------------------------------------

    def put(
        self,
        stage: Stage,
        host_offset: int,
        data: bytes | bytearray | memoryview,
        *,
        event: str = "",
        node: Node | None = None,
    ) -> None:
        """Have ``data`` (copied) written at ``host_offset`` of the file (or of ``node``) by the
        next commit.

        Puts of one stage may overlap: later ones win.
        """
        self._puts_of(node).put(stage, host_offset, data, event)

    def forget(self, host_offset: int, length: int, *, node: Node | None = None) -> None:
        """Puts that lie wholly in this range are pointless now: its space is being given back."""
        self._puts_of(node).forget(host_offset, length)

    def _puts_of(self, node: Node | None) -> Puts:
        node = node or self.file
        puts = self._puts.get(node)
        if puts is None:
            puts = self._puts[node] = Puts(node)
            self.register(puts)
        return puts

    def register(self, source: Source) -> None:
        """Commits ask ``source`` as well. Its ``name`` is reported in order of registration."""
        self.sources.append(source)

    def when_durable(self, callback: Callable[[], None]) -> None:
        """Call back once all changes made so far are durable and no older read is in flight.

        That happens inside a commit, before FREES is written; what the callback changes is best
        FREES, and is written by the same commit. It should not raise.
        """
        self._callbacks.append((self.pins.now, callback))

    def data_written(self, node: Node) -> None:
        """Guest data went to ``node``: the tables that name it wait for a flush of it."""
        self._generation += 1
        self._unflushed[id(node)] = node

    # -- to storage ------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Something would be written by a commit, or waits for one."""
        return bool(self._callbacks) or any(source.dirty_bytes for source in self.sources)

    @property
    def dirty_bytes(self) -> int:
        return sum(source.dirty_bytes for source in self.sources)

    def relieve(self) -> None:
        """Commit if memory demands it. To be called where the tables are in a consistent state."""
        if self.dirty_bytes > self.limit:
            self.commit(counts=self.lazy_counts)

    def commit(self, counts: bool = False) -> None:
        """Write everything that is dirty, in order; the last writes may still await a flush.

        ``counts``: even those that are left for later. After an error all that did not become
        durable is still dirty.
        """
        lazy = self.lazy_counts and not counts
        for stage in Stage:
            if lazy and stage in COUNTING:
                continue
            if stage is Stage.FREES:
                self._run_callbacks()
            self._write_stage(stage)
        if lazy:
            self._run_callbacks()

    def write_counts(self, even_lazy: bool = False) -> None:
        """The first stage of a commit, ahead of the flush that makes data durable as well.

        ``even_lazy``: although counts may wait, these are worth having after a crash.
        """
        if even_lazy or not self.lazy_counts:
            self._write_stage(Stage.COUNTS)

    def _write_stage(self, stage: Stage) -> None:
        sources: list[Source] = []
        writes: list[DirtyWrite] = []
        for source in self.sources:
            if found := source.collect(stage):
                sources.append(source)
                writes += found
        if not writes:
            return
        if stage is not Stage.COUNTS or self.log is not None:
            self.barrier()
        for event in dict.fromkeys(write.event for write in writes if write.event):
            self.file.event(event)
        writes.sort(key=_host_offset)
        if self.log is None:
            self._write(writes)
        else:
            self._write_by_log(self.log, writes)
        for source in sources:
            source.written(stage, self._generation)

    def _write(self, writes: Sequence[DirtyWrite]) -> None:
        batches: dict[Node, list[WriteRequest]] = {}
        for write in writes:
            batches.setdefault(write.node or self.file, []).append((write.host_offset, write.data))
        for node, batch in batches.items():
            self._unflushed[id(node)] = node
            node.writev(batch)
        self._generation += 1

    def _write_by_log(self, log: WriteAheadLog, writes: Sequence[DirtyWrite]) -> None:
        """A log before its target; what the log held before is durable by now."""
        for group in log.groups(writes):
            self.barrier()
            self.data_written(self.file)
            log.append(group)
            self.barrier()
            self._write(group)

    def barrier(self) -> None:
        """Make everything written so far durable; nothing to do where nothing was written."""
        if not self._unflushed:
            return
        try:
            for node in list(self._unflushed.values()):
                node.flush()
        except BaseException:
            self.lost()
            raise
        self._unflushed.clear()
        self.settle(self._generation)

    # A flush of the whole disk ends with a flush of its children outside of the lock: ------------

    @property
    def generation(self) -> int:
        """The number of the latest write."""
        return self._generation

    def settle(self, generation: int) -> None:
        """The children were flushed after write number ``generation``."""
        if generation == self._generation:
            self._unflushed.clear()
        for source in self.sources:
            source.settled(generation)

    def lost(self) -> None:
        """A flush of the children failed."""
        for source in self.sources:
            source.lost()

    def _run_callbacks(self) -> None:
        if not self._callbacks:
            return
        oldest = self.pins.oldest
        if all(since > oldest for since, _ in self._callbacks):
            return
        self.barrier()
        due = [entry for entry in self._callbacks if entry[0] <= oldest]
        self._callbacks = [entry for entry in self._callbacks if entry[0] > oldest]
        called = 0
        try:
            for _, callback in due:
                called += 1
                callback()
        finally:
            # None is forgotten, even if one should fail.
            self._callbacks = due[called:] + self._callbacks

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> list[tuple[str, LaminaError]]:
        """The last commit. Returns what could not be flushed, by the names of all sources: if one
        stage fails, the others are not certain to be durable either.

        Nothing is lost silently and nothing is tried for ever: after this, what is dirty is gone.
        """
        if not self.dirty:
            return []
        try:
            self.commit(counts=True)
            self.barrier()
        except LaminaError as error:
            return [(source.name, error) for source in self.sources if source.name] or [
                ("metadata", error)
            ]
        return []


class Puts:
    """Single writes to one file, kept as copies, by stage and offset; without overlaps."""

    name = ""

    def __init__(self, node: Node | None = None) -> None:
        """``node``: None for the file that all images have."""
        self._node = node
        self._offsets: dict[Stage, list[int]] = {stage: [] for stage in Stage}
        self._writes: dict[Stage, dict[int, DirtyWrite]] = {stage: {} for stage in Stage}
        self._unsettled: list[tuple[int, Stage, list[DirtyWrite]]] = []
        self.dirty_bytes = 0

    def put(
        self, stage: Stage, offset: int, data: bytes | bytearray | memoryview, event: str
    ) -> None:
        offsets, writes = self._offsets[stage], self._writes[stage]
        end = offset + len(data)
        first = bisect_left(offsets, offset)
        if first and offsets[first - 1] + len(writes[offsets[first - 1]].data) > offset:
            first -= 1
        last = bisect_left(offsets, end, lo=first)
        overlapped = [writes.pop(old) for old in offsets[first:last]]
        if overlapped:
            self.dirty_bytes -= sum(len(old.data) for old in overlapped)
            start = min(offset, overlapped[0].host_offset)
            end = max(end, overlapped[-1].host_offset + len(overlapped[-1].data))
            merged = bytearray(end - start)
            for old in (*overlapped, DirtyWrite(offset, data, event)):
                at = old.host_offset - start
                merged[at : at + len(old.data)] = old.data
            # Parts that no write covers cannot exist: what overlaps the new write adjoins it.
            offset, data = start, merged
        offsets[first:last] = [offset]
        writes[offset] = DirtyWrite(offset, bytes(data), event, self._node)
        self.dirty_bytes += len(data)

    def forget(self, offset: int, length: int) -> None:
        end = offset + length
        for stage, offsets in self._offsets.items():
            writes = self._writes[stage]
            for old in [o for o in offsets if offset <= o and o + len(writes[o].data) <= end]:
                offsets.remove(old)
                self.dirty_bytes -= len(writes.pop(old).data)
        self._unsettled = [
            (
                generation,
                stage,
                [w for w in writes if w.host_offset < offset or w.host_offset + len(w.data) > end],
            )
            for generation, stage, writes in self._unsettled
        ]

    def collect(self, stage: Stage) -> list[DirtyWrite]:
        return list(self._writes[stage].values())

    def written(self, stage: Stage, generation: int) -> None:
        writes = list(self._writes[stage].values())
        self._unsettled.append((generation, stage, writes))
        self.dirty_bytes -= sum(len(write.data) for write in writes)
        self._writes[stage] = {}
        self._offsets[stage] = []

    def settled(self, generation: int) -> None:
        self._unsettled = [entry for entry in self._unsettled if entry[0] > generation]

    def lost(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for _, stage, writes in unsettled:
            newer, offsets = self._writes[stage], self._offsets[stage]
            self._writes[stage], self._offsets[stage] = {}, []
            self.dirty_bytes -= sum(len(write.data) for write in newer.values())
            for write in (*writes, *(newer[offset] for offset in offsets)):
                self.put(stage, write.host_offset, write.data, write.event)


def _host_offset(write: DirtyWrite) -> int:
    return write.host_offset
