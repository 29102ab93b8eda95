"""Copying disks, one behind the other, onto a target.

The extents of the sources say what there is to move. Runs of data are gathered into batches of two
mebibytes, each with a buffer of its own that is used again and again (fresh pages of memory cost
more than the copy into them). Threads read batches, decoding as they go, look for zeroes, and write
them, while others read (``jobs.overlap``): in the order of their addresses, so that the target
comes out sequential, unless any order will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from lamina.block.extents import Extent, Kind
from lamina.block.limits import WriteFlags
from lamina.block.status import Status
from lamina.buffers import new_buffer
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, NamedTuple
from lamina.jobs.overlap import overlapped
from lamina.jobs.rate import RateLimit
from lamina.jobs.sources import Sources
from lamina.jobs.zeroes import between, is_zero, zero_runs
from lamina.records import dataclass
from lamina.units import MIB, round_down, round_up

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node

_BATCH = 2 * MIB
_COMPRESSED_BATCH = 4 * MIB
"""Many units, so that they can be encoded side by side."""
_LARGEST_UNIT = 4 * MIB
"""Units of the target up to which whole ones are gathered before they are written."""
_MOST_RUNS = 512
"""Runs in one batch."""
_MOST_COUNTED = 1 << 16
"""Runs of a plan that are looked at before the first of them is copied."""
_GRANULE = 4096
_PLACE = 2 * MIB


@dataclass
class Settings:
    sparse_size: int = 4096
    """This many zeroes in a row are not written as data; 0: everything is."""
    compressed: bool = False
    target_is_zero: bool = False
    """The target reads as zeroes before the first write."""
    base: Node | None = None
    """A layer of the source's chain whose content the target has already, by its own backing file
    or because it is that layer: copy only what the layers above hold."""
    zero_from: int = 0
    """Where the backing file of a new target ends: bytes behind it are zeroes already."""
    look_for_zeroes: bool = True
    """Otherwise only what the sources know to be zero is treated as such."""
    copy_range: bool = False
    """Let the storage copy by itself where it can."""
    workers: int = 8
    any_order: bool = False
    """Write what was read first, instead of having the target come out sequential."""
    rate: int = 0
    """Bytes a second; 0: as fast as can be."""
    salvage: bool = False
    """What cannot be read becomes zeroes, and a warning."""
    progress: Callable[[float], None] = lambda done: None
    """Told the part of the work that is done, from 0 to 1."""
    warn: Callable[[str], None] = lambda text: None


class Run(NamedTuple):
    """Bytes to be copied or, if ``zero``, zeroed."""

    offset: int
    length: int
    zero: bool
    extent: Extent | None = None
    """Where the sources hold the bytes."""
    place: int = 0
    """What errors name: a multiple of 2 MiB from the start of what this run is a part of."""

    @property
    def end(self) -> int:
        return self.offset + self.length


class Batch:
    """Runs that are read and written together, and the buffer they pass through."""

    __slots__ = ("buffer", "done", "length", "runs", "view", "writes", "zeroes")

    def __init__(self, size: int) -> None:
        self.buffer = new_buffer(size)
        self.view = memoryview(self.buffer)
        self.clear()

    def clear(self) -> None:
        self.runs: list[Run] = []
        self.done: list[int] = []
        """Bytes of data, in this and all batches before, up to each end of a run or of 2 MiB of
        one: what progress is measured in."""
        self.length = 0
        self.writes: list[tuple[int, memoryview]] = []
        self.zeroes: list[tuple[int, int]] = []
        """Offset and length."""


def convert(disks: list[Backend], target: Backend, settings: Settings) -> None:
    """Copy everything. The target is large enough. Raises what reading and writing raise."""
    if settings.compressed and not target.node.supports_compressed_writes:
        raise UsageError("Compression not supported for this file format")
    if settings.compressed and not target.info().cluster_size:
        raise UsageError("invalid cluster size")
    sources = Sources(disks)
    if settings.salvage:
        from lamina.jobs.salvage import SalvagedSources

        sources = SalvagedSources(disks, settings.warn)
    Conversion(sources, target, settings).run()


class Conversion:
    def __init__(self, sources: Sources, target: Backend, settings: Settings) -> None:
        self.sources = sources
        self.target = target
        self.settings = settings
        self.hold_back = RateLimit(settings.rate)
        self.total = 0
        """Bytes of data that the sources hold."""
        unit = target.limits.write_unit or max(target.limits.write_zeroes_alignment, 1)
        if settings.compressed:
            unit = target.info().cluster_size or unit
        elif unit > _LARGEST_UNIT:
            unit = 1
        self.unit = unit
        self.batch_size = max(_COMPRESSED_BATCH if settings.compressed else _BATCH, unit)
        seam = max(target.limits.write_zeroes_alignment, unit)
        self.seam = seam if seam <= self.batch_size else unit
        """Long runs are cut at multiples of this: who writes to a unit that somebody else is just
        writing to waits for them."""
        # Zeroes are looked for in pieces that the target can do without.
        self.granule = unit
        self.shortest = 0
        if unit < settings.sparse_size:
            self.granule = max(unit, min(settings.sparse_size, _GRANULE))
            self.shortest = settings.sparse_size

    def run(self) -> None:
        if self.settings.salvage:
            self._one_by_one()
        elif self.settings.copy_range:
            self._by_storage()
        else:
            self._overlapped()

    def _overlapped(self) -> None:
        pool: list[Batch] = []

        def fresh() -> Batch:
            return pool.pop() if pool else Batch(self.batch_size)

        def done(batch: Batch) -> None:
            self.report(*batch.done)
            batch.clear()
            pool.append(batch)

        def move(batch: Batch) -> None:
            self.read(batch)
            self.write(batch)

        def write(batch: Batch) -> None:
            self.write(batch)
            done(batch)

        in_order = self.settings.compressed or self.target.limits.in_order
        # Encrypting is work for several cores: the order is given up for it.
        any_order = self.settings.any_order or self.target.node.info().encrypted
        both = any_order and not in_order
        overlapped(
            self.batches(self.counted(self.plan()), fresh),
            move if both else self.read,
            done if both else write,
            workers=self.settings.workers,
        )

    def _one_by_one(self) -> None:
        """Bad storage: everything in order, so that the warnings are. They come twice, as it is
        also asked beforehand what there is to do."""
        self.total = sum(run.length for run in self.plan() if not run.zero)
        batch = Batch(self.batch_size)
        for full in self.batches(self.plan(), lambda: batch):
            self.read(full)
            self.write(full)
            self.report(*full.done)
            batch.clear()

    def _by_storage(self) -> None:
        batch = Batch(self.batch_size)
        node = self.target.node
        copied = 0
        for run in self.counted(self.plan()):
            extent, done = run.extent, 0
            if extent is not None and extent.kind == Kind.DATA and extent.node is not None:
                if extent.cipher is None:
                    done = node.copy_range_from(
                        extent.node, extent.host_offset, run.offset, run.length
                    )
                self.hold_back(done)
            if done < run.length:
                rest = run._replace(offset=run.offset + done, length=run.length - done)
                for full in self.batches([rest], lambda: batch):
                    self.read(full)
                    self.write(full)
                    batch.clear()
            copied += 0 if run.zero else run.length
            self.report(copied)

    # -- what there is to do ---------------------------------------------------------------------

    def plan(self) -> Iterator[Run]:
        """What has to be copied or zeroed, in order."""
        zeroes: Run | None = None
        for status in self.statuses():
            extent = status.extent
            offset, length = extent.guest_offset, extent.length
            if status.reads_zero and self.settings.sparse_size:
                length = self.zeroes_missing(offset, length)
                if length <= 0:
                    continue
                if zeroes is not None and zeroes.end == offset:
                    zeroes = zeroes._replace(length=zeroes.length + length)
                    continue
                if zeroes is not None:
                    yield zeroes
                zeroes = Run(offset, length, True)
            elif extent.kind != Kind.BELOW or self.settings.base is None:
                if zeroes is not None:
                    yield zeroes
                    zeroes = None
                yield Run(offset, length, False, extent)
        if zeroes is not None:
            yield zeroes

    def statuses(self) -> Iterator[Status]:
        offset = 0
        try:
            for status in self.sources.statuses(self.settings.base):
                yield status
                offset = status.extent.end
        except LaminaError as error:
            raise self.explained(error, "reading block status", offset) from None

    def zeroes_missing(self, offset: int, length: int) -> int:
        """How many of these zeroes, from the first on, the target does not have by itself."""
        if self.settings.target_is_zero:
            return 0
        if self.settings.zero_from:
            return min(length, self.settings.zero_from - offset)
        return length

    def batches(self, plan: Iterable[Run], fresh: Callable[[], Batch]) -> Iterator[Batch]:
        """The plan in pieces that fit into a buffer and end where units end."""
        if self.unit > 1:
            plan = self.whole_units(plan)
        batch: Batch | None = None
        before = done = 0
        for run in plan:
            offset, length = run.offset, run.length
            while length:
                if batch is None:
                    batch = fresh()
                take = length
                if not run.zero:
                    take = self.room(batch, offset, length)
                    if not take:
                        yield batch
                        batch = None
                        continue
                place = run.offset + round_down(offset - run.offset, _PLACE)
                batch.runs.append(Run(offset, take, run.zero, place=place))
                if not run.zero:
                    batch.length += take
                offset += take
                length -= take
                if not run.zero:
                    whole = round_down(offset - run.offset, _PLACE) if length else run.length
                    if before + whole > done:
                        done = before + whole
                        batch.done.append(done)
                if length or batch.length == self.batch_size or len(batch.runs) == _MOST_RUNS:
                    yield batch
                    batch = None
            before = done
        if batch is not None:
            yield batch

    def counted(self, plan: Iterator[Run]) -> Iterator[Run]:
        """The same, but the total is known beforehand; estimated where the plan is long."""
        first = list(islice(plan, _MOST_COUNTED))
        self.total = sum(run.length for run in first if not run.zero)
        if len(first) == _MOST_COUNTED:
            self.total = self.total * self.sources.size // max(first[-1].end, 1)
        yield from first
        yield from plan

    def room(self, batch: Batch, offset: int, length: int) -> int:
        """Of ``length`` bytes from ``offset`` on, how many go into the batch; 0: better none."""
        room = self.batch_size - batch.length
        if length <= room:
            return length
        boundaries = (self.seam,) if batch.length else (self.seam, self.unit, 1)
        ends = (round_down(offset + room, boundary) for boundary in boundaries)
        return next((end - offset for end in ends if end > offset), 0)

    def whole_units(self, plan: Iterable[Run]) -> Iterator[Run]:
        """The units that hold any data, whole, and what zeroes there are besides.

        Units cannot be encoded in parts, and writing parts makes the target copy the rest.
        """
        done = 0
        tail: Run | None = None
        for run in plan:
            start, end = max(run.offset, done), run.end
            if not run.zero:
                start = max(round_down(run.offset, self.unit), done)
                end = min(round_up(run.end, self.unit), self.sources.size)
            if tail is not None and start > tail.offset:
                yield tail
            tail = None
            if run.zero and end % self.unit and end < self.sources.size:
                # Perhaps data follows in the same unit, which is then written with these zeroes.
                last = round_down(end, self.unit)
                tail = Run(max(start, last), end - max(start, last), True)
                end = last
            if start < end:
                yield Run(start, end - start, run.zero)
                done = end
        if tail is not None:
            yield tail

    # -- doing it --------------------------------------------------------------------------------

    def read(self, batch: Batch) -> None:
        """Fill the buffer, and find out what of it is to be written."""
        requests = []
        position = 0
        for run in batch.runs:
            if not run.zero:
                part = batch.view[position : position + run.length]
                requests.append((run.offset, part))
                position += run.length
        if requests:
            try:
                self.sources.readv(requests)
            except LaminaError as error:
                raise self.explained(error, "reading", batch.runs[0].place) from None
        position = 0
        for run in batch.runs:
            if run.zero:
                batch.zeroes.append((run.offset, run.length))
            else:
                self._sort_out(batch, run, position)
                position += run.length

    def _sort_out(self, batch: Batch, run: Run, position: int) -> None:
        """Divide the run that was read to ``position`` of the buffer into data and zeroes."""
        shift = run.offset - position
        end = position + run.length
        if self.settings.compressed:
            zeroes = self._zero_units(batch.buffer, position, end)
        elif self.settings.sparse_size == 0 or not self.settings.look_for_zeroes:
            zeroes = []
        else:
            zeroes = zero_runs(
                batch.buffer, position, end, self.granule, self.shortest, -run.offset
            )
        for start, stop in between(zeroes, position, end):
            batch.writes.append((start + shift, batch.view[start:stop]))
        for start, stop in zeroes:
            length = self.zeroes_missing(start + shift, stop - start)
            if length > 0:
                batch.zeroes.append((start + shift, length))

    def _zero_units(self, buffer: bytearray, start: int, end: int) -> list[tuple[int, int]]:
        if self.settings.sparse_size == 0:
            return []
        return [
            (position, min(position + self.unit, end))
            for position in range(start, end, self.unit)
            if is_zero(buffer, position, min(position + self.unit, end))
        ]

    def write(self, batch: Batch) -> None:
        try:
            if batch.writes:
                if self.settings.compressed:
                    self.target.write_compressed(batch.writes)
                else:
                    self.target.writev(batch.writes)
            for offset, length in batch.zeroes:
                self.target.write_zeroes(offset, length, WriteFlags.MAY_UNMAP)
        except LaminaError as error:
            raise self.explained(error, "writing", self.failing_place(batch)) from None
        self.hold_back(batch.length)

    def failing_place(self, batch: Batch) -> int:
        """Which of the runs of a batch cannot be written; the first one if, by now, all can."""
        for run in batch.runs:
            for offset, data in batch.writes:
                if run.offset <= offset < run.end and not self._can_write(offset, data):
                    return run.place
        return batch.runs[0].place

    def _can_write(self, offset: int, data: memoryview) -> bool:
        try:
            if self.settings.compressed:
                self.target.write_compressed([(offset, data)])
            else:
                self.target.writev([(offset, data)])
        except LaminaError:
            return False
        return True

    def explained(self, error: LaminaError, doing: str, place: int) -> LaminaError:
        """``doing`` is reading, writing or reading block status."""
        where = "offset" if "status" in doing else "byte"
        return error.in_context(f"error while {doing} at {where} {place}: ")

    def report(self, *done: int) -> None:
        """So many bytes are done, one step after the other."""
        if self.total:
            for step in done:
                self.settings.progress(min(step / self.total, 1.0))
