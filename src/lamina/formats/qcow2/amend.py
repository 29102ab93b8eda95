"""Changing options of an existing image (``qemu-img amend``).

What makes no sense is refused before anything is written. Then, in this order: the newer version,
key slots, the width of refcounts, the data file, lazy refcounts, the size of the disk, the older
version. Each step leaves a sound image; a power cut costs leaked clusters at most.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from lamina.ciphers.luks.amend import Change
from lamina.ciphers.luks.amend import amend as amend_keys
from lamina.errors import ImageUnsupported, Refused, UsageError
from lamina.formats.qcow2.downgrade import check_features, downgrade
from lamina.formats.qcow2.encryption import luks_header
from lamina.formats.qcow2.header import close_cleanly, rewrite, write_features
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA_FILE,
    COMPAT_LAZY_REFCOUNTS,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPAT_DATA_FILE,
    V3_LENGTH,
)
from lamina.formats.qcow2.refcount_width import change_width
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.mapping import Qcow2Mapping
    from lamina.formats.qcow2.options import AmendOptions

Report = Callable[[float], None]

V3_EXTRA_DATA = 16
"""Bytes that version 3 wants in an entry of the snapshot table ("Snapshots")."""
_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def amend(disk: Disk, options: AmendOptions, progress: Report, *, force: bool) -> None:
    """Raises UsageError, Refused, ImageUnsupported, ImageCorrupt or StorageError."""
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    mapping = disk.mapping
    assert isinstance(mapping, Qcow2Mapping)
    mapping.check_usable()
    with disk.exclusive():
        plan = _plan(mapping, options, disk)
        downgrades = plan.version < mapping.header.version
        # Who knows which of them will take longer.
        halves = downgrades and plan.refcount_bits not in (None, mapping.header.refcount_bits)
        if plan.version > mapping.header.version:
            _upgrade(mapping)
        if plan.keys is not None:
            _amend_keys(mapping, plan.keys, force)
        if plan.refcount_bits is not None:
            change_width(
                mapping, plan.refcount_bits, _part(progress, 0, 2) if halves else progress
            )
        _set_data_file(mapping, options)
        if options.lazy_refcounts is not None:
            _set_lazy(mapping, options.lazy_refcounts)
    if plan.size is not None and plan.size != disk.size:
        disk.truncate(plan.size)
    with disk.exclusive():
        if downgrades:
            downgrade(mapping, _part(progress, 1, 2) if halves else progress)
        # What the next change has to say in the header may be different now.
        disk.writer.close_gate()
    disk.flush()
    progress(1.0)


def _part(progress: Report, number: int, parts: int) -> Report:
    return lambda part: progress((number + part) / parts)


@dataclass(frozen=True)
class _Plan:
    """What the options come to for this image."""

    version: int
    refcount_bits: int | None
    size: int | None
    keys: Change | None


def _plan(mapping: Qcow2Mapping, options: AmendOptions, disk: Disk) -> _Plan:
    header = mapping.header
    version = header.version
    if options.compat is not None:
        if options.compat not in _VERSIONS:
            raise UsageError(f"Unknown compatibility level {options.compat}", field="compat")
        version = _VERSIONS[options.compat]
    _check_backing(mapping, options)
    keys = _key_change(mapping, options, disk)
    _check_refcount_bits(mapping, options, version)
    _check_data_file(mapping, options)
    if options.lazy_refcounts and version < 3:
        raise UsageError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 "
            "or greater)",
            field="lazy_refcounts",
        )
    # As everywhere in QEMU's amending, a size of zero is no size.
    size = options.size or None
    if size is not None and size % SECTOR:
        raise UsageError(f"The new size must be a multiple of {SECTOR}", field="size")
    if size not in (None, header.size) and mapping.snapshots and max(version, header.version) < 3:
        raise ImageUnsupported("Can't resize a v2 image which has snapshots")
    if version < header.version:
        check_features(header)
    return _Plan(version, options.refcount_bits, size, keys)


def _check_backing(mapping: Qcow2Mapping, options: AmendOptions) -> None:
    """The backing file may be named, but not changed."""
    header = mapping.header
    given = options.backing_file, options.backing_fmt
    if given not in ((None, None), (header.backing_file, header.backing_format)):
        raise Refused(
            "Cannot amend the backing file",
            field="backing_file",
            hint="You can use 'qemu-img rebase' instead.",
        )


def _check_refcount_bits(mapping: Qcow2Mapping, options: AmendOptions, version: int) -> None:
    bits = mapping.header.refcount_bits
    if options.refcount_bits is not None:
        bits = options.refcount_bits
        if not 0 < bits <= 64 or bits & (bits - 1):
            raise UsageError(
                "Refcount width must be a power of two and may not exceed 64 bits",
                field="refcount_bits",
            )
        if version < 3 and bits != 16:
            raise UsageError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use "
                "compat=1.1 or greater)",
                field="refcount_bits",
            )
    if version < 3 and bits != 16:
        raise Refused("compat=0.10 requires refcount_bits=16", field="compat")


def _check_data_file(mapping: Qcow2Mapping, options: AmendOptions) -> None:
    header = mapping.header
    external = header.incompatible_features & INCOMPAT_DATA_FILE
    if options.data_file is not None and not external:
        raise UsageError(
            "data-file can only be set for images that use an external data file",
            field="data_file",
        )
    if options.data_file_raw and not header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE:
        raise UsageError(
            "data-file-raw cannot be set on existing images", field="data_file_raw"
        )


# -- the newer version -----------------------------------------------------------------------------


def _upgrade(mapping: Qcow2Mapping) -> None:
    """Version 3. Its snapshots must say how long the disk was."""
    from lamina.formats.qcow2.snapshotting import rewrite_table

    if any(one.extra_data_size < V3_EXTRA_DATA for one in mapping.snapshots):
        rewrite_table(mapping, list(mapping.snapshots))
    mapping.header.version = 3
    mapping.header.header_length = V3_LENGTH
    rewrite(mapping)


# -- key slots -------------------------------------------------------------------------------------


def _key_change(mapping: Qcow2Mapping, options: AmendOptions, disk: Disk) -> Change | None:
    given = (
        options.encrypt_state,
        options.encrypt_new_secret,
        options.encrypt_old_secret,
        options.encrypt_keyslot,
        options.encrypt_iter_time,
    )
    if all(value is None for value in given):
        return None
    method = mapping.header.crypt_method
    if method == CRYPT_NONE:
        raise UsageError("Can't amend encryption options - encryption not present")
    if method != CRYPT_LUKS:
        raise ImageUnsupported("Only LUKS encryption options can be amended", errno=errno.ENOTSUP)
    return Change.of(*given, look_up=disk.context.secrets.lookup)


def _amend_keys(mapping: Qcow2Mapping, change: Change, force: bool) -> None:
    assert mapping.encryption is not None
    luks, storage = luks_header(mapping.file, mapping.header)
    amend_keys(luks, storage, mapping.encryption.key, change, force=force)


# -- fields of the header --------------------------------------------------------------------------


def _set_data_file(mapping: Qcow2Mapping, options: AmendOptions) -> None:
    """What the image says about its data file, which is not touched."""
    header = mapping.header
    if options.data_file is not None:
        header.data_file = options.data_file or None
        rewrite(mapping)
    if options.data_file_raw is False and header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE:
        header.autoclear_features &= ~AUTOCLEAR_RAW_DATA_FILE
        write_features(mapping)


def _set_lazy(mapping: Qcow2Mapping, lazy: bool) -> None:
    header, metadata = mapping.header, mapping.metadata
    if lazy == bool(header.compatible_features & COMPAT_LAZY_REFCOUNTS) or header.version < 3:
        return
    # Counts that were put off are due before nobody expects them to be.
    close_cleanly(mapping)
    metadata.commit(counts=True)
    metadata.barrier()
    header.compatible_features ^= COMPAT_LAZY_REFCOUNTS
    write_features(mapping)
