"""Opening an image: the header, what it names, and a repair where the last user crashed."""

from __future__ import annotations

import errno

from lamina.engine.disk import Disk, mapping_of
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError
from lamina.formats.qcow2.about import Inspected
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_BITMAPS,
    CRYPT_NONE,
    INCOMPAT_DIRTY,
    MAX_CLUSTER_BITS,
    Header,
)
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.engine.mapping import Mapping
    from lamina.formats.qcow2.bitmap_layout import BitmapEntry
    from lamina.formats.qcow2.mapping import Qcow2Mapping
    from lamina.formats.qcow2.options import Options
    from lamina.formats.qcow2.snapshot_layout import Snapshot

INSPECTED_TABLES = 64 << 20
"""Bytes of bitmap tables that are looked at before ``info`` tells about an image."""


def open_disk(options: Options, context: OpenContext) -> Disk:
    disk = Disk(context, lambda disk: _load(disk, options, context))
    if context.inspect:
        return disk
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    mapping = mapping_of(disk, Qcow2Mapping)
    if mapping.has_bitmaps:
        mapping.bitmaps.attach()
    elif not disk.read_only and not context.check:
        _drop_stale_bitmaps(disk, mapping)
    return disk


def _drop_stale_bitmaps(disk: Disk, mapping: Qcow2Mapping) -> None:
    from lamina.formats.qcow2.header import drop_stale_bitmaps

    try:
        drop_stale_bitmaps(mapping)
    except BaseException:
        disk.close()
        raise


def read_header(file: Node, *, check: bool = False) -> Header:
    """Parse the header of ``file``. Raises ImageCorrupt or ImageUnsupported."""
    first = file.read(0, min(file.size, 4096))
    # Extensions and names may fill the first cluster, whose size is in the first bytes.
    bits = int.from_bytes(first[20:24], "big")
    if 12 < bits <= MAX_CLUSTER_BITS:
        first += file.read(len(first), min(file.size, 1 << bits) - len(first))
    return Header.parse(first, check=check)


def _load(disk: Disk, options: Options, context: OpenContext) -> Mapping:
    header = read_header(disk.file, check=context.check)
    from lamina.formats.qcow2.settings import Settings

    settings = Settings(options, header)
    snapshots = _snapshots(disk.file, header, context)
    bitmaps = _bitmaps(disk, header, context)
    data_file = None
    if header.has_data_file or any(k.startswith("data-file") for k in context.image_option):
        from lamina.formats.qcow2.data_file import open_data_file

        data_file = open_data_file(disk, header, context)
    if context.inspect:
        _open_backing(disk, header, context)
        return Inspected(disk, header, snapshots, bitmaps)
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    encryption = None
    encrypted = header.crypt_method != CRYPT_NONE or options.encrypt_format is not None
    if encrypted and not context.locked:
        from lamina.formats.qcow2.encryption import unlock_image

        encryption = unlock_image(disk.file, header, options, context)
    mapping = Qcow2Mapping(
        disk.file,
        header,
        options,
        settings=settings,
        snapshots=snapshots,
        bitmaps=bitmaps,
        read_only=disk.read_only,
        unmap=disk.options.unmap,
        disk=disk,
        data_file=data_file,
        encryption=encryption,
        warn=context.warn,
    )
    if not disk.read_only and not context.check:
        mapping.refuse_if_corrupt()
    _open_backing(disk, header, context)
    if not disk.read_only and not context.check:
        _repair_after_crash(mapping)
    return mapping


def _snapshots(file: Node, header: Header, context: OpenContext) -> list[Snapshot]:
    if not header.nb_snapshots:
        return []
    from lamina.formats.qcow2.snapshots import read_snapshots

    try:
        return read_snapshots(file, header)
    except LaminaError:
        if context.check:
            # The check reads the table again, and says what is wrong with it.
            return []
        raise


def _bitmaps(disk: Disk, header: Header, context: OpenContext) -> list[BitmapEntry]:
    if header.bitmaps is None:
        return []
    if not header.autoclear_features & AUTOCLEAR_BITMAPS:
        if header.version < 3:
            found = (
                "This qcow2 v2 image contains bitmaps, but they may have been modified by a "
                "program without persistent bitmap support; so now they must all be considered "
                "inconsistent"
            )
        else:
            found = (
                "a program lacking bitmap support modified this file, so all bitmaps are now "
                "considered inconsistent"
            )
        context.warn(
            f"warning: {found}\n"
            "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
        )
        return []
    from lamina.formats.qcow2.bitmap_storage import read_bitmaps

    try:
        if context.inspect:
            return read_bitmaps(disk.file, header, INSPECTED_TABLES)
        return read_bitmaps(disk.file, header)
    except ImageCorrupt:
        if context.check and not disk.read_only:
            # The repair finds out what is wrong with them.
            return []
        raise


def _open_backing(disk: Disk, header: Header, context: OpenContext) -> None:
    backing = context.open_named(
        "backing", header.backing_file or "", driver=header.backing_format, relative_to=disk
    )
    if backing is not None:
        disk.attach("backing", backing)


def _repair_after_crash(mapping: Qcow2Mapping) -> None:
    """The counts of a dirty image are stale: make them right before anything is allocated."""
    if not mapping.header.incompatible_features & INCOMPAT_DIRTY:
        return
    from lamina.block.driver import Fix
    from lamina.formats.qcow2.check import check

    try:
        result = check(mapping, Fix(leaks=True, errors=True), mapping.warn)
    except LaminaError as error:
        raise error.in_context("Could not repair dirty image: ") from None
    if result.check_errors or result.corruptions:
        raise ImageUnsupported(
            "Could not repair dirty image: Input/output error", errno=errno.EIO
        )
