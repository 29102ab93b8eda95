"""The header of an open image: feature bits as writing begins and ends, and rewriting it whole."""

from __future__ import annotations

import errno

from lamina.engine.metadata import Stage
from lamina.errors import StorageError
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_KNOWN,
    COMPAT_LAZY_REFCOUNTS,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    MAX_BACKING_NAME,
    Header,
)
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def is_lazy(mapping: Qcow2Mapping) -> bool:
    """Whether refcounts may be written late: an option decides, else the image itself."""
    wanted = mapping.options.lazy_refcounts
    if wanted is None:
        wanted = bool(mapping.header.compatible_features & COMPAT_LAZY_REFCOUNTS)
    return wanted and mapping.header.version >= 3


def open_for_changes(mapping: Qcow2Mapping) -> None:
    """Before the first change: what the header says must be true while the image is written to.

    Autoclear bits vouch for structures that nobody here keeps up to date, if they are unknown.
    With lazy refcounts the image is dirty until it is closed.
    """
    header = mapping.header
    before = header.incompatible_features, header.autoclear_features
    header.autoclear_features &= AUTOCLEAR_KNOWN
    if is_lazy(mapping):
        header.incompatible_features |= INCOMPAT_DIRTY
        mapping.metadata.lazy_counts = True
    if before != (header.incompatible_features, header.autoclear_features):
        try:
            write_features(mapping)
        except BaseException:
            header.incompatible_features, header.autoclear_features = before
            mapping.metadata.lazy_counts = False
            raise
    drop_stale_bitmaps(mapping)


def drop_stale_bitmaps(mapping: Qcow2Mapping) -> None:
    """Forget the bitmaps of an image that somebody wrote to who did not know of them."""
    header = mapping.header
    stale = header.bitmaps
    if stale is not None and not header.autoclear_features & AUTOCLEAR_BITMAPS:
        header.bitmaps = None
        try:
            rewrite(mapping)
        except BaseException:
            header.bitmaps = stale
            raise


def close_cleanly(mapping: Qcow2Mapping) -> None:
    """All counts are on disk: the image is not dirty any more."""
    header = mapping.header
    mapping.metadata.lazy_counts = False
    if header.incompatible_features & INCOMPAT_DIRTY:
        header.incompatible_features &= ~INCOMPAT_DIRTY
        mapping.metadata.put(
            Stage.ROOTS, 72, header.incompatible_features.to_bytes(8, "big")
        )


def mark_repaired(mapping: Qcow2Mapping) -> None:
    """A check found nothing wrong any more: neither dirty nor corrupt. Durable on return."""
    header = mapping.header
    header.incompatible_features &= ~(INCOMPAT_DIRTY | INCOMPAT_CORRUPT)
    header.autoclear_features &= AUTOCLEAR_KNOWN
    mapping.metadata.lazy_counts = False
    if header.version >= 3:
        mapping.metadata.commit(counts=True)
        mapping.metadata.barrier()
        write_features(mapping)
    drop_stale_bitmaps(mapping)
    mapping.corruption.marked = False


def write_features(mapping: Qcow2Mapping) -> None:
    header = mapping.header
    data = b"".join(
        word.to_bytes(8, "big")
        for word in (
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
        )
    )
    mapping.file.write(72, data)
    mapping.file.flush()


def rewrite(mapping: Qcow2Mapping) -> None:
    """Write the whole header cluster anew, extensions and names included. Durable on return.

    A power cut leaves the old header or the new one: storage writes a sector as a whole, and the
    sectors behind the first are changed only while the header that stands does not reach there.
    Raises ImageUnsupported (ENOSPC) if it does not fit, before anything was written.
    """
    packed = mapping.header.pack()
    metadata = mapping.metadata
    metadata.commit(counts=True)
    metadata.barrier()
    file, unit = mapping.file, mapping.header.cluster_size
    old = file.read(0, min(file.size, unit)).rstrip(b"\0")
    # Zeroes over whatever was there before.
    room = min(round_up(max(len(packed), len(old)), SECTOR), unit)
    new, standing = packed.ljust(room, b"\0"), old.ljust(room, b"\0")
    different = [
        start
        for start in range(0, room, SECTOR)
        if new[start : start + SECTOR] != standing[start : start + SECTOR]
    ]
    if len(different) <= 1:
        for start in different:
            _put(file, start, new[start : start + SECTOR])
        return
    first, rest = new[:SECTOR], new[SECTOR:]
    if len(old) > SECTOR and len(packed) > SECTOR:
        old = _shortened(file, old)
    if len(old) > SECTOR:
        _put(file, 0, first)
        _put(file, SECTOR, rest)
    else:
        _put(file, SECTOR, rest)
        _put(file, 0, first)


def _shortened(file: Node, old: bytes) -> bytes:
    """Let the header in the file do without names of features, so that one sector is enough for it,
    and return what it is now; as it was, if not even that suffices."""
    short = Header.parse(old, check=True).pack(feature_names=False)
    if len(short) > SECTOR:
        return old
    _put(file, 0, short.ljust(SECTOR, b"\0"))
    return short


def _put(file: Node, offset: int, data: bytes) -> None:
    file.writev([(offset, data)])
    file.flush()


def change_backing_file(
    mapping: Qcow2Mapping, filename: str | None, format: str | None
) -> None:
    """Have the header name another backing file, or none."""
    header = mapping.header
    before = header.backing_file, header.backing_format
    if filename and len(filename.encode("utf-8", "surrogateescape")) > MAX_BACKING_NAME:
        raise StorageError.from_errno(errno.EINVAL)
    header.backing_file = filename or None
    header.backing_format = (format or None) if filename else None
    try:
        rewrite(mapping)
    except BaseException:
        header.backing_file, header.backing_format = before
        raise
