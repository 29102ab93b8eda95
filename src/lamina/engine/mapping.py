"""The contract between a format and the engine.

A mapping knows where guest bytes live in its children and publishes changes to its tables. It
moves no guest data, encodes nothing, and takes no lock: the engine (``engine.disk.Disk``, the node
that wraps a mapping) calls every method with the disk's metadata lock held, and never calls
``commit`` of a reservation before the data of all of its pieces is written.

Tables are changed in memory; ``metadata`` (``engine.metadata.Metadata``) carries them to storage in
the order that crash safety demands: counts up, then tables, then roots, then counts down, with a
flush of the file between stages. The same flushes keep data ahead of the tables that name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from lamina.block.extents import Cipher
    from lamina.block.node import Node, WriteRequest
    from lamina.block.permissions import Perm
    from lamina.engine.metadata import Metadata


class Piece(NamedTuple):
    """Where one run of a write goes. All figures in bytes."""

    guest_offset: int
    length: int
    node: Node
    host_offset: int
    """Of ``guest_offset``; the copies lie right before and right behind."""
    copy_head: int = 0
    """Bytes before ``guest_offset`` to be brought over from the old content."""
    copy_tail: int = 0
    fresh: bool = False
    """The place was just allocated and no reader can see it until ``commit``."""
    reads_zero: bool = False
    """The place (with its copies) is known to read as zeroes: zeroes need not be written."""
    cipher: Cipher | None = None
    first_sector: int = 0
    """Tweak of the sector at ``guest_offset - copy_head``."""


class Reservation(ABC):
    """Space for writes. Leaving it without ``commit`` gives the space back.

    The engine: reads what the pieces want copied, writes data and copies, then commits.
    """

    pieces: list[Piece]

    @abstractmethod
    def commit(self) -> None:
        """Publish: the tables now name the new places. If it raises, it has aborted."""

    @abstractmethod
    def abort(self) -> None:
        """Give back what was reserved. Never raises."""


class InPlace(Reservation):
    """A reservation that reserved nothing: every byte has its place already."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def commit(self) -> None:
        pass

    def abort(self) -> None:
        pass


class Mapping(ABC):
    """What a format implements. ``file`` (and ``backing``, …) are children of the disk."""

    driver: ClassVar[str]

    size: int
    """Guest bytes."""
    unit: int
    """The smallest range in guest bytes that has a fate of its own: what is copied on write and
    zeroed as one. Need not be a power of two."""
    allocation_unit: int = 0
    """What is allocated and discarded as one, and the granularity at which the engine serialises
    requests that change tables: a multiple of ``unit``. 0: the same as ``unit``."""
    metadata: Metadata

    discard_unit: int = 0
    """What discards are whole multiples of; 0: ``allocation_unit``. Less where a discard changes no
    table and the storage of any part can go."""
    write_unit: int = 0
    """Writes of whole multiples of this have nothing copied around them; 0: ``unit``. Less where
    the rest of a new unit reads as zeroes by itself, or stays below."""
    encoded_unit: int = 0
    """Bytes of a unit that ``reserve_encoded`` takes; 0: the format has no compressed writes."""
    codec: str = ""
    """Which codec compressed writes use."""
    encodes_always: bool = False
    """Units are stored compressed and in no other way: every write is one of whole units, and what
    does not shrink is stored all the same."""
    stores_compressed_plain: bool = False
    """Compressed writes are taken, but what they bring is stored as it is."""
    fixed: bool = False
    """Every guest byte has a place of its own from the start: the holes of the files are all that
    is known of zeroes."""
    vmstate_offset: int = 0
    """Guest offset behind the disk where VM state is kept; 0: nowhere."""
    request_alignment: int = 1
    """What offsets and lengths of requests must be multiples of: 512 where data is encrypted."""
    data_node: Node
    """What ``locate`` points into. Only mappings that override ``locate`` or ``locate_for_writing``
    need it."""
    raw_node: Node | None = None
    """A child that has to read like the disk itself, byte for byte, whatever the tables say: what
    is zeroed or discarded is zeroed there first."""

    # -- reading ---------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, offset: int, length: int) -> list[Extent]:
        """Where the bytes are: coalesced, in order, without gaps; never one call per cluster.

        Addresses behind ``size`` (VM state, the rest of the last cluster) resolve like any other.
        Raises ImageCorrupt for a table that breaks the rules.
        """

    def status(self, offset: int, length: int) -> list[Extent]:
        """The same for somebody who wants to know where the bytes are, not what they are: tells it
        even where reading would be refused."""
        return self.resolve(offset, length)

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        """The quick way for small reads: a host offset in ``data_node`` for every request.

        -1 stands for a request that is not one run of plain, unencrypted data there (or whose
        table is not at hand): the engine then resolves. None: there is no quick way.
        """
        return None

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        """The same as arrays, for whole-image work."""
        step = 1 << 36
        for start in range(offset, offset + length, step):
            extents = self.resolve(start, min(step, offset + length - start))
            yield Columns.from_extents(extents)

    # -- writing ---------------------------------------------------------------------------------

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        """The quick way for small writes: as ``locate``, and a host offset only where the data may
        be written in place without any change of tables."""
        return None

    @abstractmethod
    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        """Places for writes to these (guest offset, length): sorted, without overlaps.

        No allocation unit is touched by two of the ranges; adjoining writes arrive as one range.
        The last one may end within the last unit of the disk: the rest of that unit is to be copied
        like any other tail. If it raises, nothing has been reserved.
        """

    def reserve_encoded(self, units: Sequence[tuple[int, int]]) -> Reservation:
        """Places for encoded units (guest offset, encoded bytes). One piece per unit, in order;
        its ``length`` is the encoded one. Committing replaces whatever the unit held."""
        raise ImageUnsupported("Compression not supported for this file format")

    def framed(self, offset: int, encoded: bytes) -> bytes:
        """What is stored of the encoded unit at this guest offset: for formats that put something
        around it. Called without the disk's lock."""
        return encoded

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """Whole units read as zeroes from now on, by tables alone. Ends at a multiple of ``unit``.

        The range consists of whole allocation units, or lies within one of them. False: this format
        cannot say it for this range; the engine has the storage zero whatever does not read as
        zeroes by then.
        """
        return False

    def discard(self, offset: int, length: int) -> None:
        """Whole allocation units are no longer needed. Never exposes other old content."""

    def uses_more_than(self, length: int) -> bool | None:
        """Whether more bytes than this of the file are allocated; None: nobody counts them."""
        return None

    # -- the whole -------------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        raise ImageUnsupported("Image format driver does not support resize")

    @abstractmethod
    def info(self) -> NodeInfo: ...

    def before_first_write(self) -> None:
        """A gate: called once, before the first change (dirty bits, generation counts)."""

    def flush(self) -> None:
        """Bring the tables to storage. The engine flushes the children afterwards."""
        self.metadata.commit()

    def reopened(self, *, read_only: bool) -> None:
        """The disk changed between reading and writing."""

    def close(self) -> None:
        """Last words of a writable image, after the last flush (clear a dirty bit)."""

    def child_permissions(
        self, role: str, perm: Perm, shared: Perm, read_only: bool
    ) -> tuple[Perm, Perm] | None:
        """For roles that differ from what every format needs; None: the usual."""
        return None
