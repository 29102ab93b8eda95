"""The persistent dirty bitmaps of an open image.

A bitmap is stored when the image is closed. Before anything is recorded in it the directory says
that it is in use: a crash then leaves a bitmap that nobody relies on, and at worst leaked clusters.

* before the first change, every bitmap that records is marked as in use;
* before a bitmap changes otherwise, it is marked as well;
* when storing, the bits and tables of all are written anew and then, those being durable, a new
  directory, to which the header switches. Where nothing but marks changes they change in place.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from lamina.block.dirty import DirtyBitmap, check_new
from lamina.block.tracking import track, untrack
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
from lamina.formats.qcow2.bitmap_storage import (
    Stored,
    cancel,
    clusters_of,
    load_bits,
    store_bits,
    write_new,
)
from lamina.formats.qcow2.extensions import (
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAPS,
    BitmapsExtension,
)
from lamina.formats.qcow2.header import open_for_changes, rewrite
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
)
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass, replace
from lamina.units import KIB

if TYPE_CHECKING:
    from lamina.block.bitset import Bitset
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
        self._attached = False

    def _known(self, entry: BitmapEntry) -> Persistent:
        inconsistent = bool(entry.flags & IN_USE)
        dirty = DirtyBitmap(
            entry.name,
            self._mapping.header.size,
            entry.granularity,
            enabled=bool(entry.flags & AUTO) and not inconsistent,
            persistent=True,
            inconsistent=inconsistent,
            load=lambda bits: self._load(item, bits),
        )
        item = Persistent(dirty, entry)
        return item

    def _load(self, item: Persistent, bits: Bitset) -> None:
        assert item.entry is not None
        load_bits(self._mapping.file, self._mapping.header, item.entry, bits)

    @property
    def entries(self) -> list[BitmapEntry]:
        """The directory, and behind it those that it does not know yet."""
        return [_entry(item) if item.entry is None else item.entry for item in self.items]

    def attach(self) -> None:
        """Have the disk mark in these bitmaps what is written to it. Twice is harmless."""
        assert self._mapping.disk is not None
        for item in () if self._attached else self.items:
            track(self._mapping.disk, item.dirty)
        self._attached = True

    def detach(self) -> None:
        assert self._mapping.disk is not None
        for item in self.items if self._attached else ():
            untrack(self._mapping.disk, item.dirty)
        self._attached = False

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
        check_new(name, granularity)
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
        self.attach()
        self.items.insert(stored, Persistent(dirty))
        track(disk, dirty)

    def _not_storable(self, name: str, granularity: int) -> str:
        header = self._mapping.header
        if header.version < 3:
            return "Cannot store dirty bitmaps in qcow2 v2 files"
        if bitmap_bytes(header.size, granularity) > MAX_BITS:
            return "Too much space will be occupied by the bitmap. Use larger granularity"
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
            return f"Name length exceeds maximum ({MAX_NAME} characters)"
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
            self._switch_alone(rest, clusters_of(self._mapping, item.entry))
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

        If it raises, nothing changed there: bitmaps that had changed stay marked as in use.
        """
        changed = [item for item in self.items if self._is_changed(item)]
        if not changed and all(self._is_stored(item) for item in self.items):
            return
        open_for_changes(self._mapping)
        if changed:
            self._store_all()
        else:
            self._write_flags(
                replace(item.entry, flags=item.flags)
                for item in self.items
                if item.entry is not None
            )

    def _store_all(self) -> None:
        """Write all bitmaps anew; if that fails, none."""
        entries: list[BitmapEntry] = []
        written: list[tuple[Persistent, Stored]] = []
        taken: list[Freed] = []
        try:
            for item in self.items:
                if not item.dirty.inconsistent:
                    stored = self._write(item)
                    written.append((item, stored))
                    taken += stored.taken
                    entries.append(_entry(item, stored))
                elif item.entry is not None:
                    entries.append(item.entry)
            self._switch(entries, taken, [run for _, stored in written for run in stored.freed])
        except BaseException:
            for item, stored in written:
                item.dirty.not_stored(stored.chunks)
            cancel(self._mapping, taken)
            raise

    def _write(self, item: Persistent) -> Stored:
        try:
            return store_bits(self._mapping, item.entry, item.dirty)
        except LaminaError as error:
            name = item.dirty.name
            raise error.in_context(f"Failed to write bitmap '{name}' to file: ") from None

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

    def _switch(
        self, entries: Sequence[BitmapEntry], taken: list[Freed], freed: Sequence[Freed]
    ) -> None:
        """Have the header name a directory of these entries, then give back the old one and what
        the new one does not name.

        If this raises, what is left in ``taken`` is named by nobody.
        """
        mapping = self._mapping
        header = mapping.header
        before = header.bitmaps, header.autoclear_features
        packed = pack_directory(entries)
        try:
            if packed:
                offset = write_new(mapping, packed, "bitmap directory", taken)
                header.bitmaps = BitmapsExtension(len(entries), len(packed), offset)
                header.autoclear_features |= AUTOCLEAR_BITMAPS
            else:
                header.bitmaps = None
                header.autoclear_features &= ~AUTOCLEAR_BITMAPS
            # It may not fit. Once the header is being written, nobody knows what it names.
            header.pack()
            taken.clear()
            rewrite(mapping)
        except BaseException:
            header.bitmaps, header.autoclear_features = before
            raise
        old = before[0]
        if old is not None:
            first = old.directory_offset >> header.cluster_bits
            freed = [*freed, Freed(first, self._clusters(old.directory_size))]
        mapping.allocator.free_later(freed)
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
        self._switch_alone([item.entry for item in self.items if item.entry is not None], ())

    def _switch_alone(self, entries: Sequence[BitmapEntry], freed: Sequence[Freed]) -> None:
        taken: list[Freed] = []
        try:
            self._switch(entries, taken, freed)
        except BaseException:
            cancel(self._mapping, taken)
            raise

    def _clusters(self, length: int) -> int:
        return -(-length >> self._mapping.header.cluster_bits)


def _entry(item: Persistent, stored: Stored | None = None) -> BitmapEntry:
    """Of the directory, for a bitmap that was stored there."""
    dirty = item.dirty
    place, size = (0, 0) if stored is None else (stored.table_offset, stored.table_size)
    return BitmapEntry(dirty.name, place, size, item.flags, dirty.granularity.bit_length() - 1)


def keep_only(mapping: Qcow2Mapping, entries: Sequence[BitmapEntry]) -> None:
    """After a check that counted nothing else: have the image forget all other bitmaps, which are
    damaged. Durable on return; the disk does not mark in the others until they are attached."""
    mapping.bitmaps.detach()
    mapping.bitmaps = Bitmaps(mapping, entries)
    mapping.bitmaps.rewrite_directory()
