"""Where the clusters of an expandable image are, and how new ones come to be.

A cluster without a place reads as zeroes, or as the backing file that the user gave. Data is
written before the entry that names it; a cluster that lost its entry is used again, or given back,
once that is durable and nobody is reading it any more. While an image is being written to, its
header says so, and its file may be longer than it has to be.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lamina.block.extents import Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.engine.blocktable import BlockMapping, BlockTable
from lamina.engine.mapping import Reservation
from lamina.engine.metadata import Metadata, Stage
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, UsageError
from lamina.formats.parallels.allocation import ClusterReservation, Clusters, Growth, freeing
from lamina.formats.parallels.layout import (
    CLOSED,
    IN_USE,
    IN_USE_OFFSET,
    SIZE,
    Header,
    parse,
)
from lamina.formats.parallels.survey import Survey, survey
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import PAGE, SECTOR

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.formats.parallels.extension import Extension
    from lamina.formats.parallels.options import ParallelsOptions

_PREALLOCATION = {"falloc": Preallocation.FALLOC, "truncate": Preallocation.OFF}
_STATE = struct.Struct("<IIIQ")
"""The fields of the header that change: in_use, data_off, flags, ext_off."""


class ParallelsMapping(BlockMapping):
    driver = "parallels"
    special = {0: Kind.BELOW}
    base = 0

    def __init__(self, disk: Disk, options: ParallelsOptions, context: OpenContext) -> None:
        self.disk = disk
        self.options = options
        self.file = self.data_node = disk.file
        self.header: Header = read_header(self.file)
        self.size = self.header.size
        self.unit = self.block_bytes = self.header.cluster_size
        self.scale = self.header.entry_scale
        self.metadata = Metadata(self.file)
        self.table = BlockTable(self.metadata, host_offset=SIZE, entries=self.header.entries)
        self.growth = self._growth()
        self.clusters: Clusters
        """Only while the image is writable."""
        self._marked = False
        """The header says that somebody is writing."""
        self.extension: Extension | None = None
        self.extension_error: LaminaError | None = None
        self._read_extension(context)
        backing = context.open_named("backing", "", driver=None, relative_to=disk)
        if backing is not None:
            disk.attach("backing", backing)
            self.has_backing = True
        # New clusters come from the end of the file, which reads as zeroes.
        self.write_unit = 0 if self.has_backing else PAGE
        if not (disk.read_only or context.check):
            self.prepare_to_write()

    def _growth(self) -> Growth:
        mode = _PREALLOCATION.get(self.options.prealloc_mode)
        if mode is None:
            raise UsageError(
                f"invalid parameter value: {self.options.prealloc_mode}", field="prealloc-mode"
            )
        return Growth(self.file, mode, self.options.prealloc_size)

    # -- the format extension --------------------------------------------------------------------

    def _read_extension(self, context: OpenContext) -> None:
        header, disk = self.header, self.disk
        if not header.extension_sector:
            return
        if header.in_use != CLOSED:
            # Who closed the image knew nothing of it, or nobody did.
            context.warn("warning: Format Extension is out of date and is ignored")
            return
        from lamina.block.tracking import track
        from lamina.formats.parallels.extension import dirty_bitmap, read_extension

        try:
            self.extension = read_extension(self.file, header)
        except LaminaError as error:
            if not context.check:
                raise
            self.extension_error = error
            return
        if not disk.read_only:
            self._refuse_to_change()
            if not context.check:
                context.warn("warning: Format Extension ignored in RW mode")
            return
        for feature in self.extension.bitmaps:
            track(disk, dirty_bitmap(self.file, header, feature))

    def _refuse_to_change(self) -> None:
        if self.extension is not None and self.extension.necessary:
            raise ImageUnsupported(
                "The image has features that a program must know to change it",
                format="parallels",
                structure="format extension",
            )

    # -- tables ----------------------------------------------------------------------------------

    def check_places(self, block: int, lowest: int, highest: int) -> None:
        if lowest < self.header.table_end or highest >= self.growth.length:
            raise ImageCorrupt(
                f"cluster {block} is outside image",
                path=self.file.filename,
                format="parallels",
                structure="BAT",
                field=f"entry {block}",
                offset=SIZE + 4 * block,
            )

    def survey(self) -> Survey:
        return survey(self.table, self.header, self.file.size)

    def data_offset(self, found: Survey) -> int:
        """Where clusters may begin; the header's word for it counts if it fits what is there."""
        header = self.header
        offset = header.data_start * SECTOR
        lowest = found.used[0][0] if found.used else self.file.size
        if header.is_sound_data_start(self.file.size) and 0 < offset <= lowest:
            return offset
        default = header.default_data_offset
        if not header.by_cluster and found.used:
            # The grid is that of the clusters that are there.
            default = lowest - (lowest - header.table_end) // self.unit * self.unit
        return default

    # -- writing ---------------------------------------------------------------------------------

    def prepare_to_write(self) -> None:
        """Find out what is free; put right what is wrong, as long as nothing new is written."""
        found = self.survey()
        if self.header.in_use == IN_USE or not found.is_sound or self.has_bad_data_start(found):
            from lamina.block.driver import Fix
            from lamina.formats.parallels.check import check

            result = check(self, Fix(leaks=True, errors=True), self.disk.context.warn)
            if result.corruptions or result.check_errors:
                raise ImageCorrupt("Could not repair corrupted image", format="parallels")
            found = self.survey()
        self.set_free_space(found)

    def has_bad_data_start(self, found: Survey) -> bool:
        return (
            bool(self.header.data_start or self.header.by_cluster)
            and self.data_offset(found) != self.header.data_start * SECTOR
        )

    def space_in_use(self, found: Survey) -> list[tuple[int, int]]:
        """(start, end) of host bytes that belong to something, ascending and apart."""
        if self.extension is None:
            return found.used
        if self.extension.kept:
            # Nobody knows what else belongs to features that are not known.
            return [(self.data_offset(found), self.file.size)]
        used = [*found.used]
        used += [(place, place + self.unit) for place in self.extension.places(self.header)]
        return sorted(used)

    def set_free_space(self, found: Survey, start: int = 0) -> None:
        """Nothing of the extension is given away: it counts until the first write.

        ``start``: no place is given away that begins before this host offset, which is on the grid.
        """
        limit = 0xFFFFFFFF * self.scale
        start = max(start, self.data_offset(found))
        used = [(max(first, start), end) for first, end in self.space_in_use(found) if end > start]
        self.clusters = Clusters(self.file, start, self.unit, used, limit)

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        return ClusterReservation(self, ranges)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        if self.has_backing:
            return super().zero(offset, length, may_unmap=may_unmap)
        self._free(offset, length)
        return True

    def discard(self, offset: int, length: int) -> None:
        if self.has_backing:
            # What is below must not come to light.
            super().discard(offset, length)
        else:
            self._free(offset, length)

    def _free(self, offset: int, length: int) -> None:
        first = offset // self.unit
        places: list[int] = []
        for index, entries in self.table.runs(first, -(-(offset + length) // self.unit) - first):
            for block, entry in enumerate(entries, index):
                if entry:
                    places.append(entry * self.scale)
                    self.table[block] = 0
        if places:
            self.metadata.when_durable(freeing(self, places))

    # -- the whole -------------------------------------------------------------------------------

    def info(self) -> NodeInfo:
        return NodeInfo(
            self.disk.filename,
            "parallels",
            self.size,
            self.file.info().actual_size,
            dirty=None,
            specific=self._specific(),
        )

    def _specific(self) -> dict[str, object] | None:
        if self.extension is None or not self.extension.bitmaps:
            return None
        bitmaps = [
            {"name": one.name, "granularity": one.granularity} for one in self.extension.bitmaps
        ]
        return {"bitmaps": bitmaps}

    def before_first_write(self) -> None:
        """The image is in use, and its bitmaps will not be true any longer: they go."""
        extension, place = self.extension, self.header.extension_sector
        kept = b"" if extension is None else extension.kept
        if not kept:
            place = 0
        self.write_state(replace(self.header, in_use=IN_USE, extension_sector=place, flags=0))
        self._marked = True
        if kept:
            from lamina.formats.parallels.extension import Extension, pack_extension

            # As long as the image is in use nobody believes what is there.
            self.file.write(place * SECTOR, pack_extension(kept, self.unit))
            self.file.flush()
            self.extension = Extension((), False, kept)
        elif extension is not None:
            # Its clusters are free now.
            self.extension = None
            self.set_free_space(self.survey())

    def write_state(self, header: Header) -> None:
        """Bring the fields of ``header`` that may change to storage, at once."""
        state = _STATE.pack(
            header.in_use, header.data_start, header.flags, header.extension_sector
        )
        self.file.write(IN_USE_OFFSET, state)
        self.file.flush()
        self.header = header

    def reopened(self, *, read_only: bool) -> None:
        if not read_only:
            self._refuse_to_change()
            self.growth = self._growth()
            self.prepare_to_write()

    def close(self) -> None:
        """Nobody is writing any more."""
        if not self._marked:
            return
        self.trim()
        self.header = replace(self.header, in_use=CLOSED)
        self.metadata.put(Stage.FREES, IN_USE_OFFSET, struct.pack("<I", CLOSED))
        self._marked = False

    def trim(self) -> None:
        """Cut off what was set aside and is not used. Only while nobody writes."""
        self.clusters.shrink()
        if self.file.size > self.clusters.end:
            self.file.truncate(self.clusters.end, exact=False)
        self.growth.length = self.file.size

    # -- another size ----------------------------------------------------------------------------

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        from lamina.formats.parallels.resize import resize

        if self.extension is not None and self.extension.kept:
            raise ImageUnsupported(
                "The image has features that a program must know to resize it",
                format="parallels",
                structure="format extension",
            )
        resize(self, size, preallocation)

    def settle(self) -> None:
        """The BAT is durable, no read is in flight that knows an older one, and what lost its place
        meanwhile is free."""
        self.metadata.commit()
        self.disk.drain_reads()
        self.metadata.commit()
        self.metadata.barrier()

    def publish(self, header: Header) -> None:
        """Another header takes effect, durably. The BAT is, and reads as the new one will."""
        self.file.write(0, header.pack())
        self.file.flush()
        self.header = header
        self.size = header.size
        self.table.resize(header.entries)
        self.disk.drain_reads()


def read_header(file: Node) -> Header:
    """Raises ImageCorrupt or ImageUnsupported."""
    header = parse(file.read(0, min(SIZE, file.size)))
    if header.table_end > file.size:
        raise ImageCorrupt(
            "The BAT lies behind the end of the image",
            path=file.filename,
            format="parallels",
            structure="header",
            field="nb_bat_entries",
            offset=32,
        )
    return header
