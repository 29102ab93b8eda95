"""How large a new image would be: by arithmetic, and by what its source holds."""

from __future__ import annotations

import errno

from lamina.block.driver import Measurement
from lamina.block.limits import Preallocation
from lamina.block.occupancy import data_units
from lamina.errors import UsageError
from lamina.formats.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1,
    MIN_CLUSTER_BITS,
)
from lamina.hints import TYPE_CHECKING
from lamina.units import KIB, SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qcow2.options import CreateOptions


def measure(options: CreateOptions, source: Node | None) -> Measurement:
    """Bytes of an image with these options that holds ``source``, or nothing.

    Options that do not change the size are not looked at. Raises UsageError, ImageUnsupported.
    """
    version = _check_options(options)
    unit = options.cluster_size
    size = round_up(options.size if source is None else source.size, SECTOR)
    metadata = _metadata_clusters(options, size) * unit
    if options.encrypt_format == "luks":
        from lamina.formats.qcow2.encryption import luks_clusters

        metadata += luks_clusters(options) * unit
    data = round_up(size, unit)
    full = metadata + data
    if options.preallocation in (Preallocation.FALLOC.value, Preallocation.FULL.value):
        required = full
    elif source is None:
        required = metadata
    elif options.backing_file is not None:
        # Nobody knows what of it the backing file holds already.
        required = full
    else:
        required = metadata + data_units(source, unit) * unit
    bitmaps = None
    if source is not None and version >= 3:
        bitmaps = _bitmap_bytes(source, unit)
    return Measurement(required, full, bitmaps)


def _check_options(options: CreateOptions) -> int:
    """The version of the format. Raises UsageError, ImageUnsupported."""
    unit = options.cluster_size
    if not 1 << MIN_CLUSTER_BITS <= unit <= 1 << MAX_CLUSTER_BITS or unit & (unit - 1):
        raise UsageError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and "
            f"{(1 << MAX_CLUSTER_BITS) // KIB}k"
        )
    if options.preallocation not in (None, *(mode.value for mode in Preallocation)):
        raise UsageError(f"invalid parameter value: {options.preallocation}")
    if options.compat not in (None, "0.10", "v2", "1.1", "v3"):
        raise UsageError(f"Invalid compatibility level: '{options.compat}'")
    version = 2 if options.compat in ("0.10", "v2") else 3
    bits = options.refcount_bits
    if not 0 < bits <= 64 or bits & (bits - 1):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use "
            "compat=1.1 or greater)"
        )
    if options.extended_l2 and unit < 1 << 14:
        raise UsageError(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        )
    if options.encrypt_format == "luks" and options.encrypt_key_secret is None:
        raise UsageError("Parameter 'encrypt.key-secret' is required for cipher")
    return version


def _metadata_clusters(options: CreateOptions, size: int) -> int:
    """Header, L1 and L2 tables, refcount table and blocks of an image whose disk is all there."""
    unit = options.cluster_size
    data = -(-size // unit)
    l2 = -(-data // (unit // (16 if options.extended_l2 else 8)))
    if l2 * 8 > MAX_L1:
        raise UsageError(
            "The image size is too large (try using a larger cluster size)", errno=errno.EFBIG
        )
    counted = 1 + -(-l2 * 8 // unit) + l2 + data
    table = blocks = 0
    while True:
        # The refcount structure counts itself, too.
        need = -(-(counted + table + blocks) * options.refcount_bits // (unit * 8))
        if need == blocks:
            break
        table, blocks = -(-need * 8 // unit), need
    return counted - data + table + blocks


def _bitmap_bytes(source: Node, unit: int) -> int | None:
    """What copies of the persistent bitmaps of ``source`` take; None: it can have none."""
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    layer = source.unfiltered
    if not isinstance(layer, Disk) or not isinstance(layer.mapping, Qcow2Mapping):
        return None
    if layer.mapping.header.version < 3:
        return None
    if not layer.mapping.has_bitmaps:
        return 0
    clusters = directory = 0
    for entry in layer.mapping.bitmaps.entries:
        data = -(-source.size // (entry.granularity * 8 * unit))
        clusters += data + -(-data * 8 // unit)
        directory += entry.length
    return (clusters + -(-directory // unit)) * unit
