"""The header of an open image: feature bits as writing begins and ends, and rewriting it whole."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from lamina.engine.metadata import Stage
from lamina.errors import StorageError
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_KNOWN,
    COMPAT_LAZY_REFCOUNTS,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    MAX_BACKING_NAME,
)
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.qcow2.mapping import Qcow2Mapping


def is_lazy(mapping: Qcow2Mapping) -> bool:
    """Whether refcounts may be written late: an option decides, else the image itself."""
    wanted = mapping.options.lazy_refcounts
    if wanted is None:
        wanted = bool(mapping.header.compatible_features & COMPAT_LAZY_REFCOUNTS)
    return wanted and mapping.header.version >= 3


def open_for_changes(mapping: Qcow2Mapping) -> None:
    """Before the first change: what the header says must be true while the image is written to.

    Autoclear bits vouch for structures that nobody here keeps up to date: bitmaps, and whatever
    unknown ones stand for. With lazy refcounts the image is dirty until it is closed.
    """
    header = mapping.header
    before = header.incompatible_features, header.autoclear_features
    header.autoclear_features &= AUTOCLEAR_KNOWN & ~AUTOCLEAR_BITMAPS
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

    Raises ImageUnsupported (ENOSPC) if it does not fit, before anything was written.
    """
    packed = mapping.header.pack()
    metadata = mapping.metadata
    metadata.commit(counts=True)
    metadata.barrier()
    # One write, and zeroes over whatever was there before.
    room = min(round_up(len(packed) + 4096, SECTOR), mapping.header.cluster_size)
    mapping.file.writev([(0, packed.ljust(room, b"\0"))])
    mapping.file.flush()


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
