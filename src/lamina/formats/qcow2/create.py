"""Making a new image: header, refcount table, refcount blocks, L1 table, in this order."""

from __future__ import annotations

import errno
from array import array

from lamina.block import registry
from lamina.block.limits import Preallocation
from lamina.errors import LaminaError, UsageError
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA_FILE,
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_TYPES,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
    MAX_CLUSTER_BITS,
    MAX_L1,
    MIN_CLUSTER_BITS,
    V2_LENGTH,
    V3_LENGTH,
    Header,
)
from lamina.formats.qcow2.options import CreateOptions, Options
from lamina.hints import TYPE_CHECKING
from lamina.units import KIB, SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.qcow2.mapping import Qcow2Mapping

_VERSIONS = {None: 3, "0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


def create(options: CreateOptions, file: Node, context: CreateContext | None = None) -> None:
    """Turn the empty ``file`` into an image. Raises UsageError, ImageUnsupported, StorageError."""
    header = new_header(options)
    preallocation = _preallocation(options)
    encryption = data_file = None
    if options.encrypt_format is not None or options.encryption:
        from lamina.formats.qcow2.encryption import NewEncryption

        assert context is not None
        encryption = NewEncryption(options, context)
    if options.data_file is not None:
        from lamina.formats.qcow2.data_file import create_data_file

        assert context is not None
        if options.data_file_raw and preallocation is Preallocation.OFF:
            # The file alone reads like the disk only if every cluster is known to lie there.
            preallocation = Preallocation.METADATA
        data_file = create_data_file(options, header, preallocation, context)
        header.data_file = data_file.filename
    write_empty(header, file, preallocation, data_file)
    if encryption is not None:
        encryption.apply(_new_mapping(header, file, data_file))
    if data_file is not None:
        data_file.flush()


def new_header(options: CreateOptions) -> Header:
    """The header that the options describe, tables not placed yet. Raises UsageError for values
    and combinations that make no sense."""
    version = _version(options)
    _check_options(options, version)
    header = Header(
        version=version,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=round_up(options.size, SECTOR),
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=V3_LENGTH if version >= 3 else V2_LENGTH,
        compression_type=COMPRESSION_TYPES.index(options.compression_type),
        compatible_features=COMPAT_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
    )
    if header.compression_type:
        header.incompatible_features |= INCOMPAT_COMPRESSION
    if options.extended_l2:
        header.incompatible_features |= INCOMPAT_EXTENDED_L2
    if options.data_file is not None:
        header.incompatible_features |= INCOMPAT_DATA_FILE
        header.data_file = options.data_file
        if options.data_file_raw:
            header.autoclear_features |= AUTOCLEAR_RAW_DATA_FILE
    if header.l1_entries_needed * 8 > MAX_L1:
        raise UsageError(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            errno=errno.EFBIG,
        )
    return header


def _check_options(options: CreateOptions, version: int) -> None:
    """Each of them, and what they are together, in the order in which QEMU looks at them."""
    _check_encryption(options)
    size = options.cluster_size
    if not 1 << MIN_CLUSTER_BITS <= size <= 1 << MAX_CLUSTER_BITS or size & (size - 1):
        raise UsageError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and "
            f"{(1 << MAX_CLUSTER_BITS) // KIB}k"
        )
    if options.compression_type not in COMPRESSION_TYPES:
        raise UsageError(
            f"Parameter 'compression-type' does not accept value '{options.compression_type}'"
        )
    if options.backing_fmt is not None and not registry.is_known(options.backing_fmt):
        raise UsageError(
            f"Parameter 'backing-fmt' does not accept value '{options.backing_fmt}'"
        )
    preallocation = _preallocation(options)
    _check_extended_l2(options, version)
    if (
        preallocation is not Preallocation.OFF
        and options.backing_file is not None
        and not options.extended_l2
    ):
        raise UsageError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    if options.backing_fmt is not None and options.backing_file is None:
        raise UsageError("Backing format cannot be used without backing file")
    if version < 3 and options.lazy_refcounts:
        raise UsageError(_needs_v3("Lazy refcounts only"))
    bits = options.refcount_bits
    if not 0 < bits <= 64 or bits & (bits - 1):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use "
            "version=v3 or greater)"
        )
    _check_data_file(options, version)
    if options.compression_type != "zlib" and version < 3:
        raise UsageError(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)"
        )


def _version(options: CreateOptions) -> int:
    try:
        return _VERSIONS[options.compat]
    except KeyError:
        raise UsageError(
            f"Parameter 'version' does not accept value '{options.compat}'"
        ) from None


def _preallocation(options: CreateOptions) -> Preallocation:
    try:
        return Preallocation(options.preallocation or "off")
    except ValueError:
        raise UsageError(
            f"Parameter 'preallocation' does not accept value '{options.preallocation}'"
        ) from None


def _needs_v3(what: str) -> str:
    return (
        f"{what} supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )


def _check_encryption(options: CreateOptions) -> None:
    format = options.encrypt_format
    if options.encryption is not None:
        if format is not None:
            raise UsageError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time"
            )
        format = "aes" if options.encryption else None
    given = any(
        value is not None
        for value in (
            options.encrypt_key_secret,
            options.encrypt_cipher_alg,
            options.encrypt_cipher_mode,
            options.encrypt_ivgen_alg,
            options.encrypt_ivgen_hash_alg,
            options.encrypt_hash_alg,
            options.encrypt_iter_time,
        )
    )
    if format is None:
        if given:
            raise UsageError("Parameter 'encrypt.format' is missing")
        return
    if format not in ("aes", "luks"):
        raise UsageError(f"Parameter 'format' does not accept value '{format}'")
    if options.encrypt_key_secret is None:
        raise UsageError("Parameter 'encrypt.key-secret' is required for cipher")


def _check_extended_l2(options: CreateOptions, version: int) -> None:
    if not options.extended_l2:
        return
    if version < 3:
        raise UsageError(_needs_v3("Extended L2 entries are only"))
    if options.cluster_size < 16 * KIB:
        raise UsageError(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        )


def _check_data_file(options: CreateOptions, version: int) -> None:
    if options.data_file_raw and options.data_file is None:
        raise UsageError("data-file-raw requires data-file")
    if options.data_file_raw and options.backing_file is not None:
        raise UsageError("Backing file and data-file-raw cannot be used at the same time")
    if options.data_file is not None and version < 3:
        raise UsageError(_needs_v3("External data files are only"))


# -- writing it ----------------------------------------------------------------------------------


def write_empty(
    header: Header, file: Node, preallocation: Preallocation, data_file: Node | None = None
) -> None:
    """Place the tables of an empty image and write them; ``file`` is empty."""
    from lamina.formats.qcow2.preallocation import clusters_needed, with_refcounts

    unit = header.cluster_size
    guest_clusters = -(-header.size // unit)
    reftable = 1
    end = 0
    if preallocation is not Preallocation.OFF:
        # The refcount table has room for everything at once, so that it need not move.
        total = clusters_needed(header, guest_clusters)
        reftable = with_refcounts(header, total)[2]
        end = clusters_needed(header, guest_clusters, reftable) * unit
    if preallocation in (Preallocation.FALLOC, Preallocation.FULL):
        file.truncate(end, preallocation)
    _place_tables(header, reftable)
    packed = _packed(header)
    _write_tables(header, file)
    file.write(0, packed)
    if preallocation is not Preallocation.OFF and guest_clusters:
        _preallocate(header, file, data_file)
    file.flush()


def _packed(header: Header) -> bytes:
    try:
        return header.pack()
    except LaminaError as error:
        if header.backing_file is None:
            raise
        raise error.in_context(
            f"Could not assign backing file '{header.backing_file}' with format "
            f"'{header.backing_format}': "
        ) from None


def _place_tables(header: Header, reftable_clusters: int) -> None:
    unit = header.cluster_size
    header.l1_size = header.l1_entries_needed
    header.refcount_table_offset = unit
    header.refcount_table_clusters = reftable_clusters
    if header.l1_size:
        # Behind the first refcount block.
        header.l1_table_offset = (2 + reftable_clusters) * unit


def _write_tables(header: Header, file: Node) -> None:
    """The refcount table and blocks, and the L1 table, which is all zeroes.

    A long L1 table may need more blocks to count it: they come to lie behind it.
    """
    from lamina.formats.qcow2.preallocation import with_refcounts
    from lamina.formats.qcow2.refblock import Width
    from lamina.formats.qcow2.refcounts import to_big_endian

    unit = header.cluster_size
    width = Width(header.refcount_order)
    per_block = width.entries(unit)
    l1_bytes = header.l1_size * 8
    l1_clusters = -(-l1_bytes // unit)
    used, blocks, table_clusters = with_refcounts(
        header, 1 + l1_clusters, header.refcount_table_clusters
    )
    if table_clusters > header.refcount_table_clusters:
        _place_tables(header, table_clusters)
    first_block = 1 + table_clusters
    behind = first_block + 1 + l1_clusters
    places = [first_block, *range(behind, behind + blocks - 1)]
    for index, place in enumerate(places):
        block = bytearray(unit)
        width.fill(block, 0, min(per_block, used - index * per_block), 1)
        file.write(place * unit, block)
    table = array("Q", [place * unit for place in places])
    file.write(unit, to_big_endian(table).ljust(table_clusters * unit, b"\0"))
    end = header.l1_table_offset + l1_bytes
    if l1_bytes and file.size < end:
        file.write(end - 8, bytes(8))


def _preallocate(header: Header, file: Node, data_file: Node | None) -> None:
    from lamina.formats.qcow2.preallocation import preallocate

    unit = header.cluster_size
    mapping = _new_mapping(header, file, data_file)
    tables_end = header.l1_table_offset + round_up(header.l1_size * 8, unit)
    try:
        preallocate(mapping, 0, header.size, tables_end)
    except LaminaError as error:
        raise error.in_context("Could not resize image: ") from None
    mapping.metadata.commit(counts=True)


def _new_mapping(header: Header, file: Node, data_file: Node | None) -> Qcow2Mapping:
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    return Qcow2Mapping(
        file, header, Options(), read_only=False, data_file=data_file, warn=_no_warning
    )


def _no_warning(text: str) -> None:
    """A new image cannot be corrupt."""
