"""Where the bytes of a VMDK are: in its extents, each of which answers for its part."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.errors import StorageError
from lamina.formats.vmdk.allocation import VmdkReservation
from lamina.formats.vmdk.descriptor import Descriptor, new_cid
from lamina.formats.vmdk.extents import FlatExtent, VmdkExtent
from lamina.formats.vmdk.layout import pack_grain
from lamina.formats.vmdk.opening import (
    Source,
    allocation_unit,
    check_writable,
    open_extents,
)
from lamina.formats.vmdk.sparse import SparseExtent
from lamina.formats.vmdk.stream import StreamExtent
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node, WriteRequest
    from lamina.engine.disk import Disk


class VmdkMapping(Mapping):
    driver = "vmdk"
    codec = "grain"
    stores_compressed_plain = True

    def __init__(self, disk: Disk, context: OpenContext) -> None:
        self.disk = disk
        self.file: Node = disk.file
        self.context = context
        self.source = Source(self.file)
        self.descriptor: Descriptor = self.source.descriptor
        self.metadata = Metadata(self.file)
        self.parent_checked = False
        self._changed = False
        self.backing_name = self.descriptor.parent_name
        if self.backing_name:
            backing = context.open_named(
                "backing", self.backing_name, driver="vmdk", relative_to=disk
            )
            if backing is not None:
                disk.attach("backing", backing)
        self.extents = open_extents(
            disk, self.source, self.metadata, context, backed=bool(self.backing_name)
        )
        check_writable(disk, self.extents)
        self.settle()

    def settle(self) -> None:
        """What follows from the extents."""
        extents = self.extents
        self.starts = [extent.start for extent in extents]
        self.size = extents[-1].end
        self.unit = allocation_unit(extents, self.size)
        # Otherwise a unit is the whole disk, and no tables speak of such.
        self.grains_meet = self.unit == max(
            (extent.grain for extent in extents if extent.grain), default=self.unit
        )
        self.fixed = all(isinstance(extent, FlatExtent) for extent in extents)
        only = extents[0] if len(extents) == 1 else None
        self.encodes_always = only is not None and only.compressed
        self.encoded_unit = self.unit if self.encodes_always else 0
        self.only = only if isinstance(only, (SparseExtent, FlatExtent)) else None
        if only is not None and only.node is not None:
            self.data_node = only.node

    # -- reading ---------------------------------------------------------------------------------

    def parts(self, offset: int, length: int) -> Iterator[tuple[VmdkExtent, int, int]]:
        """The extents that hold this range: (extent, offset, length)."""
        end = offset + length
        index = max(bisect_right(self.starts, offset) - 1, 0)
        last = len(self.extents) - 1
        while offset < end:
            extent = self.extents[index]
            stop = end if index == last else min(end, extent.end)
            yield extent, offset, stop - offset
            offset = stop
            index += 1

    def resolve(self, offset: int, length: int) -> list[Extent]:
        found = self.status(offset, length)
        if not self.parent_checked and any(extent.kind is Kind.BELOW for extent in found):
            self.check_parent()
        return found

    def status(self, offset: int, length: int) -> list[Extent]:
        if len(self.extents) == 1:
            return self.extents[0].resolve(offset, length)
        found: list[Extent] = []
        for extent, start, count in self.parts(offset, length):
            found += extent.resolve(start, count)
        return found

    def check_parent(self) -> None:
        """The content below is the one that this disk was made upon. Raises StorageError (EINVAL).
        """
        parent = self._parent()
        if parent is not None and parent.cid != self.descriptor.parent_cid:
            raise StorageError.from_errno(errno.EINVAL)
        self.parent_checked = True

    def adopt_parent(self) -> None:
        """Whatever is below now is what this disk is made upon."""
        parent = self._parent()
        if parent is not None:
            self.put_descriptor(self.descriptor.with_parent_cid(parent.cid))

    def _parent(self) -> Descriptor | None:
        backing = self.disk.backing
        below = None if backing is None else getattr(backing.unfiltered, "mapping", None)
        return below.descriptor if isinstance(below, VmdkMapping) else None

    def locate(self, requests: Sequence[tuple[int, memoryview]]) -> list[int] | None:
        return self._places(requests)

    def locate_for_writing(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        only = self.only
        if only is None or not only.writable:
            return None
        return self._places(requests)

    def _places(self, requests: Sequence[WriteRequest]) -> list[int] | None:
        only = self.only
        if isinstance(only, FlatExtent):
            shift = only.host_offset
            return [offset + shift for offset, _ in requests]
        if only is None or only.compressed:
            return None
        locate = only.locate
        return [locate(offset, len(data)) for offset, data in requests]

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        for extent, start, count in self.parts(offset, length):
            yield from extent.columns(start, count)

    # -- writing ---------------------------------------------------------------------------------

    def before_first_write(self) -> None:
        """The content is another one from now on: children are to notice, whatever happens."""
        self._changed = True
        self.renew_cid()
        for extent in self.extents:
            if isinstance(extent, StreamExtent) and extent.writable:
                extent.begin()

    def renew_cid(self) -> None:
        """Durable when this returns. Raises what writing raises."""
        self.put_descriptor(self.descriptor.with_cid(new_cid()))
        self.metadata.commit()
        self.metadata.barrier()

    def put_descriptor(self, descriptor: Descriptor) -> None:
        """Have it written by the next commit. Raises StorageError (ENOSPC) if it has no room."""
        source = self.source
        data = descriptor.encoded()
        before = self.descriptor.encoded()
        if source.descriptor_room:
            if len(data) > source.descriptor_room:
                raise StorageError.from_errno(errno.ENOSPC)
            data = data.ljust(len(before), b"\0")
        elif len(data) < len(before):
            # NULs end the text as the end of the file does, and need no second step.
            data = data.ljust(len(before), b"\n")
        self.metadata.put(Stage.ROOTS, source.descriptor_offset, data)
        self.descriptor = descriptor

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        reservation = VmdkReservation()
        try:
            for offset, length in ranges:
                for extent, start, count in self.parts(offset, length):
                    extent.reserve(start, count, reservation)
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def reserve_encoded(self, units: Sequence[tuple[int, int]]) -> Reservation:
        extent = self.only
        assert isinstance(extent, SparseExtent)
        reservation = VmdkReservation()
        if not extent.writable:
            raise extent.refusal()
        try:
            for offset, length in units:
                extent.reserve_encoded(offset, length, reservation)
        except StorageError as error:
            reservation.abort()
            if error.structure == "allocated grain":
                self.context.warn("error: Could not write to allocated cluster for streamOptimized")
            raise
        except BaseException:
            reservation.abort()
            raise
        return reservation

    def framed(self, offset: int, encoded: bytes) -> bytes:
        return pack_grain(offset, encoded)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        if not self.grains_meet:
            return False
        # Not all(): where tables can say it they do, and the rest is written once more.
        done = True
        for extent, start, count in self.parts(offset, length):
            done &= extent.zero(start, count)
        return done

    def discard(self, offset: int, length: int) -> None:
        if not self.grains_meet:
            return
        for extent, start, count in self.parts(offset, length):
            inside = count if extent.grain else min(count, extent.end - start)
            extent.discard(start, inside)

    # -- the whole -------------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.vmdk.resize import resize

        resize(self, size, preallocation)

    def info(self) -> NodeInfo:
        from lamina.formats.vmdk.about import describe

        return describe(self)

    def flush(self) -> None:
        for extent in self.extents:
            if isinstance(extent, StreamExtent):
                extent.place_tables()
        self.metadata.commit()

    def reopened(self, *, read_only: bool) -> None:
        if not read_only:
            for extent in self.extents:
                extent.check_writable()
        for extent, line in zip(self.extents, self.descriptor.extents, strict=False):
            extent.writable = not read_only and line.access == "RW"

    def close(self) -> None:
        if not self._changed:
            return
        for extent in self.extents:
            if extent.writable:
                extent.finish()
        self._changed = False
