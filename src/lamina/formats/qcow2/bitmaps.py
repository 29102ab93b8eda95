"""The persistent dirty bitmaps of an open image.

A bitmap is stored when the image is closed. Before anything is recorded in it the directory says
that it is in use: a crash then leaves a bitmap that nobody relies on, and at worst leaked clusters.

* before the first change, every bitmap that records is marked as in use;
* when storing, so are those that changed otherwise; their bits and tables are written; then, all of
  that being durable, the directory: in place where only marks change, else as a new one, to which
  the header switches.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lamina.block.dirty import DirtyBitmap, check_granularity
from lamina.block.tracking import track, untrack
from lamina.engine.metadata import Stage
from lamina.errors import ImageUnsupported, LaminaError, Refused, UsageError
from lamina.formats.qcow2.allocation import Freed
from lamina.formats.qcow2.bitmap_layout import (
    AUTO,
    FLAGS_FIELD,
    IN_USE,
    MAX_BITS,
    MAX_NAME,
    BitmapEntry,
    bitmap_bytes,
    pack_directory,
    table_entries,
)
from lamina.formats.qcow2.bitmap_storage import clusters_of, load_bits, store_bits
from lamina.formats.qcow2.header import open_for_changes, rewrite
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAPS,
    BitmapsExtension,
)
from lamina.records import dataclass, replace
from lamina.units import KIB

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping


@dataclass(eq=False)
class Persistent:
    """A bitmap, and what the directory in the file says of it."""

    dirty: DirtyBitmap
    entry: BitmapEntry | None = None
    """None: it was never stored."""

    @property
    def flags(self) -> int:
        """What the directory has to say once everything is stored."""
        if self.dirty.inconsistent:
            return self.entry.flags | IN_USE if self.entry is not None else IN_USE
        return AUTO if self.dirty.enabled else 0


class Bitmaps:
    def __init__(self, mapping: Qcow2Mapping, entries: Sequence[BitmapEntry]) -> None:
        self._mapping = mapping
        self.items = [self._known(entry) for entry in entries]
        """In the order of the directory; new ones behind those that it knows."""

    def _known(self, entry: BitmapEntry) -> Persistent:
        mapping = self._mapping
        inconsistent = bool(entry.flags & IN_USE)
        dirty = DirtyBitmap(
            entry.name,
            mapping.header.size,
            entry.granularity,
            enabled=bool(entry.flags & AUTO) and not inconsistent,
            persistent=True,
            inconsistent=inconsistent,
            load=lambda bits: load_bits(mapping.file, mapping.header, entry, bits),
        )
        return Persistent(dirty, entry)

    @property
    def entries(self) -> list[BitmapEntry]:
        """The directory as it would be if everything were stored now."""
        return [
            item.entry
            if item.entry is not None
            else BitmapEntry(
                item.dirty.name, 0, 0, item.flags, item.dirty.granularity.bit_length() - 1
            )
            for item in self.items
        ]

    def attach(self) -> None:
        """Have the disk mark in these bitmaps what is written to it."""
        assert self._mapping.disk is not None
        for item in self.items:
            track(self._mapping.disk, item.dirty)

    def detach(self) -> None:
        assert self._mapping.disk is not None
        for item in self.items:
            untrack(self._mapping.disk, item.dirty)

    # -- changes ---------------------------------------------------------------------------------

    def add(self, name: str, granularity: int | None) -> None:
        """A new bitmap, which records; in the file once bitmaps are stored.

        ``granularity``: bytes; None: a cluster, but no less than 4 KiB and no more than 64 KiB.
        Raises UsageError, ImageUnsupported.
        """
        header, disk = self._mapping.header, self._mapping.disk
        assert disk is not None
        if self._mapping.read_only:
            raise Refused("Block node is read-only", errno=errno.EACCES)
        if granularity is None:
            granularity = min(max(header.cluster_size, 4 * KIB), 64 * KIB)
        check_granularity(granularity)
        if not name:
            raise UsageError("Bitmap name cannot be empty")
        if any(one.name == name for one in disk.dirty_bitmaps):
            raise UsageError(f"Bitmap already exists: {name}", errno=errno.EEXIST)
        reason = self._not_storable(name, granularity)
        if reason:
            raise ImageUnsupported(
                f"Can't make bitmap '{name}' persistent in '{disk.name}': {reason}"
            )
        dirty = DirtyBitmap(name, header.size, granularity, persistent=True)
        stored = sum(item.entry is not None for item in self.items)
        # Among the new ones the latest comes first: the order in which QEMU stores them.
        self.items.insert(stored, Persistent(dirty))
        track(disk, dirty)

    def _not_storable(self, name: str, granularity: int) -> str:
        header = self._mapping.header
        if header.version < 3:
            return "Cannot store dirty bitmaps in qcow2 v2 files"
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
            return f"Name length exceeds maximum ({MAX_NAME} characters)"
        if bitmap_bytes(header.size, granularity) > MAX_BITS:
            return "Too much space will be occupied by the bitmap. Use larger granularity"
        if len(self.items) >= MAX_BITMAPS:
            return "Maximum number of persistent bitmaps is already reached"
        new = BitmapEntry(name, 0, 0, 0, 0)
        if sum(entry.length for entry in (*self.entries, new)) > MAX_BITMAP_DIRECTORY:
            return "Not enough space in the bitmap directory"
        return ""

    def remove(self, dirty: DirtyBitmap) -> None:
        """Forget a bitmap, here and in the file. Durable on return."""
        item = self._find(dirty)
        self._check_writable(dirty)
        if item.entry is not None:
            rest = [one.entry for one in self.items if one is not item and one.entry is not None]
            open_for_changes(self._mapping)
            self._switch(rest, freed=clusters_of(self._mapping, item.entry))
        self.items.remove(item)
        assert self._mapping.disk is not None
        untrack(self._mapping.disk, dirty)

    def remove_all(self) -> None:
        """The same for every bitmap."""
        for dirty in [item.dirty for item in self.items]:
            self.remove(dirty)

    def change(self, dirty: DirtyBitmap) -> None:
        """This bitmap is about to change other than by what is written to the disk.

        Raises ImageCorrupt if it is inconsistent, Refused if the image may only be read.
        """
        dirty.check_usable()
        self._check_writable(dirty)
        self._mark_in_use([self._find(dirty)])

    def _find(self, dirty: DirtyBitmap) -> Persistent:
        return next(item for item in self.items if item.dirty is dirty)

    def _check_writable(self, dirty: DirtyBitmap) -> None:
        if self._mapping.read_only:
            raise Refused(
                f"Bitmap '{dirty.name}' is readonly and cannot be modified", errno=errno.EACCES
            )

    # -- while the disk changes ------------------------------------------------------------------

    def before_first_write(self) -> None:
        """What is stored of the bitmaps that record is outdated from now on."""
        self._mark_in_use(item for item in self.items if item.dirty.enabled)

    def before_resize(self) -> None:
        """The tables of all bitmaps, as they are stored, will be those of another disk.

        Raises ImageCorrupt if there is a bitmap that cannot follow.
        """
        for item in self.items:
            item.dirty.check_usable()
        for item in self.items:
            item.dirty.load()
        self._mark_in_use(self.items)

    def _mark_in_use(self, items: Iterable[Persistent]) -> None:
        marked = [
            replace(item.entry, flags=item.entry.flags | IN_USE)
            for item in items
            if item.entry is not None
        ]
        self._write_flags(marked)

    def _write_flags(self, entries: Iterable[BitmapEntry]) -> None:
        """Change the flags in the directory to those of ``entries``, each of which has the name and
        the table of one there. Durable on return."""
        known = {item.dirty.name: item for item in self.items}
        places = self._places()
        writes, settled = [], []
        for entry in entries:
            item = known[entry.name]
            assert item.entry is not None
            if item.entry.flags != entry.flags:
                flags = entry.flags.to_bytes(4, "big")
                writes.append((places[entry.name] + FLAGS_FIELD, flags))
            settled.append((item, entry))
        if writes:
            self._mapping.file.writev(writes)
            self._mapping.file.flush()
        for item, entry in settled:
            item.entry = entry

    def _places(self) -> dict[str, int]:
        """Host offset of each entry of the directory, by the name of the bitmap."""
        extension = self._mapping.header.bitmaps
        offset = 0 if extension is None else extension.directory_offset
        places = {}
        for item in self.items:
            if item.entry is not None:
                places[item.entry.name] = offset
                offset += item.entry.length
        return places

    # -- storing ---------------------------------------------------------------------------------

    def store(self) -> None:
        """Bring everything to the file. Durable on return.

        Raises the first error after having stored all that could be: what could not be stays marked
        as in use or, if it was new, is missing; it can be tried again.
        """
        changed = [item for item in self.items if self._is_changed(item)]
        if not changed and all(self._is_stored(item) for item in self.items):
            return
        open_for_changes(self._mapping)
        self._mark_in_use(changed)
        written: dict[Persistent, BitmapEntry] = {}
        freed: list[Freed] = []
        failure: LaminaError | None = None
        for item in changed:
            try:
                written[item] = self._write(item, freed)
            except LaminaError as error:
                name = item.dirty.name
                failure = failure or error.in_context(f"Failed to write bitmap '{name}' to file: ")
        try:
            self._settle()
            self._publish(changed, written, freed)
        except BaseException:
            # Nobody knows what of it reached the file.
            for item in written:
                item.dirty.inconsistent, item.dirty.enabled = True, False
            raise
        for item in written:
            with item.dirty.bits() as bits:
                bits.changed.clear()
        if failure is not None:
            raise failure

    def store_finally(self) -> None:
        """The same, the last time: what is lost now is lost, and reported."""
        assert self._mapping.disk is not None
        try:
            self.store()
        except LaminaError as error:
            name = self._mapping.disk.name
            self._mapping.warn(
                f"error: Lost persistent bitmaps during inactivation of node '{name}': {error}"
            )

    def _settle(self) -> None:
        self._mapping.metadata.commit(counts=True)
        self._mapping.metadata.barrier()

    def _is_changed(self, item: Persistent) -> bool:
        """Its bits, or the length of their table, are not what the file has."""
        if item.dirty.inconsistent:
            return False
        size = table_entries(self._mapping.header, item.dirty.granularity)
        return item.entry is None or item.entry.table_size != size or item.dirty.is_changed

    def _is_stored(self, item: Persistent) -> bool:
        return item.entry is None or item.entry.flags == item.flags

    def _write(self, item: Persistent, freed: list[Freed]) -> BitmapEntry:
        """Write table and bits; the new entry of the directory."""
        dirty = item.dirty
        with dirty.bits() as bits:
            table = store_bits(self._mapping, item.entry, dirty.granularity, bits)
        freed += table.freed
        granularity_bits = dirty.granularity.bit_length() - 1
        return BitmapEntry(dirty.name, table.offset, table.size, item.flags, granularity_bits)

    def _publish(
        self,
        changed: Sequence[Persistent],
        written: dict[Persistent, BitmapEntry],
        freed: Sequence[Freed],
    ) -> None:
        """Have the directory say what is stored now, then give back what is not needed for it."""
        entries = []
        moved = False
        for item in self.items:
            old, new = item.entry, written.get(item)
            if new is None and old is not None:
                # Either nothing changed but maybe its flags, or it could not be written.
                new = old if item in changed else replace(old, flags=item.flags)
            if new is not None:
                entries.append(new)
                moved |= old is None or old.table_offset != new.table_offset
        if moved:
            self._switch(entries, freed)
            return
        self._write_flags(entries)
        self._mapping.allocator.free_later(freed)
        self._settle()

    def _switch(self, entries: Sequence[BitmapEntry], freed: Sequence[Freed]) -> None:
        """Have the header name a directory of these entries, then give back the old one and what
        the new one does not name."""
        mapping = self._mapping
        header, allocator = mapping.header, mapping.allocator
        before = header.bitmaps, header.autoclear_features
        packed = pack_directory(entries)
        clusters = self._clusters(len(packed))
        offset = allocator.allocate_table(clusters, "bitmap directory") if packed else 0
        try:
            if packed:
                mapping.metadata.put(Stage.TABLES, offset, packed)
                header.bitmaps = BitmapsExtension(len(entries), len(packed), offset)
                header.autoclear_features |= AUTOCLEAR_BITMAPS
            else:
                header.bitmaps = None
                header.autoclear_features &= ~AUTOCLEAR_BITMAPS
            rewrite(mapping)
        except BaseException:
            header.bitmaps, header.autoclear_features = before
            if packed:
                mapping.metadata.forget(offset, clusters << header.cluster_bits)
                allocator.cancel(offset, clusters)
            raise
        old = before[0]
        if old is not None:
            first = old.directory_offset >> header.cluster_bits
            freed = [*freed, Freed(first, self._clusters(old.directory_size))]
        allocator.free_later(freed)
        mapping.overlap.forget()
        named = {entry.name: entry for entry in entries}
        for item in self.items:
            item.entry = named.get(item.dirty.name)
        self._settle()

    def rewrite_directory(self) -> None:
        """Put a new one in place of one that is damaged. Durable on return."""
        mapping = self._mapping
        damaged = mapping.header.bitmaps
        assert damaged is not None
        if damaged.directory_offset + damaged.directory_size > mapping.file.size:
            # There is nothing to give back.
            mapping.header.bitmaps = None
        self._switch([item.entry for item in self.items if item.entry is not None], ())

    def _clusters(self, length: int) -> int:
        return -(-length >> self._mapping.header.cluster_bits)


def keep_only(mapping: Qcow2Mapping, entries: Sequence[BitmapEntry]) -> None:
    """After a check that counted nothing else: have the image forget all other bitmaps, which are
    damaged. Durable on return."""
    mapping.bitmaps.detach()
    mapping.bitmaps = Bitmaps(mapping, entries)
    mapping.bitmaps.attach()
    mapping.bitmaps.rewrite_directory()
