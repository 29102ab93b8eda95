"""qcow2 on disk: bytes to dataclasses and back, every figure checked. Nothing here does I/O.

The sections named below are those of the format's specification ("The QCOW2 image format", in
QEMU's docs/interop/qcow2.txt). All integers are big-endian, all offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import struct

from lamina.errors import ImageUnsupported
from lamina.formats.qcow2.extensions import (
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
    EXT_END,
    EXT_FEATURE_NAMES,
    NAMES_NEED_MORE_THAN,
    BitmapsExtension,
    CryptoExtension,
    describe_features,
    incompatible_names,
    pack_extension,
    pack_feature_names,
    split_extensions,
)
from lamina.formats.qcow2.fields import bytes_of, header_error, text_of
from lamina.records import dataclass, field
from lamina.units import MIB

MAGIC = b"QFI\xfb"

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_TABLE = 8 * MIB
MAX_L1 = 32 * MIB
MAX_SNAPSHOTS = 65536
MIN_SNAPSHOT = 40
"""Bytes of an entry of the snapshot table without extra data and names."""
MAX_BACKING_NAME = 1023
MAX_OFFSET = (1 << 63) - 1
"""File offsets are signed 64-bit numbers wherever files are kept."""
MAX_HOST_OFFSET = (1 << 56) - 1
"""Entries of tables have 56 bits for an offset."""

# -- table entries ("Cluster mapping", "Host cluster management") --------------------------------

COPIED = 1 << 63
"""The refcount of what this entry names is exactly one: it may be written in place."""
COMPRESSED = 1 << 62
ZERO_FLAG = 1
OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFTABLE_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
REFTABLE_RESERVED = 0x00000000000001FF

# -- feature bits ("Header") ---------------------------------------------------------------------

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
INCOMPAT_KNOWN = 0x1F
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA_FILE = 1 << 1
AUTOCLEAR_KNOWN = 0x03

COMPRESSION_TYPES = ("zlib", "zstd")
CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
V2_LENGTH = 72
V3_MIN_LENGTH = 104
V3_LENGTH = 112

assert _V2.size == V2_LENGTH
assert V2_LENGTH + _V3.size == V3_MIN_LENGTH


@dataclass
class Header:
    """The header cluster: fixed fields, extensions, the backing file's name.

    Fields have the specification's names. What this version does not know (a longer header,
    extensions, compatible bits) is kept and written back as it was.
    """

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    """Guest bytes."""
    crypt_method: int = CRYPT_NONE
    l1_size: int = 0
    """Entries."""
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_LENGTH
    compression_type: int = 0
    unknown_tail: bytes = b""
    """Header bytes behind the fields that this version knows."""

    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    crypto: CryptoExtension | None = None
    bitmaps: BitmapsExtension | None = None
    unknown_extensions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & INCOMPAT_EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def subcluster_size(self) -> int:
        """The smallest part of a cluster that has a fate of its own; else the whole of it."""
        return self.cluster_size // 32 if self.extended_l2 else self.cluster_size

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible_features & INCOMPAT_DATA_FILE)

    @property
    def compression_name(self) -> str:
        return COMPRESSION_TYPES[self.compression_type]

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries that cover the guest disk."""
        return l1_entries_for(self.size, self.cluster_bits, self.l2_entries)

    # -- reading -----------------------------------------------------------------------------

    @classmethod
    def parse(cls, cluster: bytes, *, check: bool = False) -> Header:
        """From the first bytes of the file: its first cluster, less where the file is shorter.

        ``check``: tolerate what a repair can mend (no refcount table, a bad snapshot table).
        Raises ImageCorrupt or ImageUnsupported, in the order in which QEMU looks at the fields.
        """
        if cluster[:4] != MAGIC:
            raise header_error("Image is not in qcow2 format", "magic", 0)
        version = int.from_bytes(cluster[4:8].ljust(4, b"\0"), "big")
        if version not in (2, 3):
            raise ImageUnsupported(
                f"Unsupported qcow2 version {version}",
                format="qcow2",
                structure="header",
                field="version",
                offset=4,
            )
        fixed = V2_LENGTH if version == 2 else V3_MIN_LENGTH
        if len(cluster) < fixed:
            raise header_error("qcow2 header too short", "header_length", 100)
        (
            _,
            _,
            backing_offset,
            backing_size,
            cluster_bits,
            size,
            crypt_method,
            l1_size,
            l1_offset,
            reftable_offset,
            reftable_clusters,
            nb_snapshots,
            snapshots_offset,
        ) = _V2.unpack_from(cluster)
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise header_error(
                f"Unsupported cluster size: 2^{cluster_bits}", "cluster_bits", 20
            )
        header = cls(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=crypt_method,
            l1_size=l1_size,
            l1_table_offset=l1_offset,
            refcount_table_offset=reftable_offset,
            refcount_table_clusters=reftable_clusters,
            nb_snapshots=nb_snapshots,
            snapshots_offset=snapshots_offset,
            header_length=V2_LENGTH,
        )
        if version == 3:
            header._parse_version_3(cluster)
        if backing_offset > header.cluster_size:
            raise header_error("Invalid backing file offset", "backing_file_offset", 8)
        header._check_features(cluster, backing_offset)
        header._check_tables(check)
        header._parse_extensions(cluster, backing_offset)
        if header.crypt_method == CRYPT_LUKS and header.crypto is None:
            raise header_error("Missing CRYPTO header for crypt method 2", "crypt_method", 32)
        if backing_offset:
            # The name ends with the first cluster, wherever it starts.
            if backing_size > min(MAX_BACKING_NAME, header.cluster_size - backing_offset):
                raise header_error("Backing file name too long", "backing_file_size", 16)
            name = cluster[backing_offset : backing_offset + backing_size]
            header.backing_file = text_of(name)
        return header

    def _parse_version_3(self, cluster: bytes) -> None:
        (
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            self.header_length,
        ) = _V3.unpack_from(cluster, V2_LENGTH)
        length = self.header_length
        if length < V3_MIN_LENGTH:
            raise header_error("qcow2 header too short", "header_length", 100)
        if length > self.cluster_size:
            raise header_error("qcow2 header exceeds cluster size", "header_length", 100)
        if length > V3_MIN_LENGTH:
            self.compression_type = cluster[V3_MIN_LENGTH] if len(cluster) > V3_MIN_LENGTH else 0
        self.unknown_tail = cluster[V3_LENGTH:length].ljust(max(0, length - V3_LENGTH), b"\0")

    def _check_features(self, cluster: bytes, backing_offset: int) -> None:
        if self.compression_type >= len(COMPRESSION_TYPES):
            raise header_error(
                f"qcow2: unknown compression type: {self.compression_type}",
                "compression_type",
                104,
            )
        flagged = bool(self.incompatible_features & INCOMPAT_COMPRESSION)
        if bool(self.compression_type) != flagged:
            must = "must not" if flagged else "must"
            raise header_error(
                f"qcow2: Compression type incompatible feature bit {must} be set",
                "incompatible_features",
                72,
            )
        unknown = self.incompatible_features & ~INCOMPAT_KNOWN
        if unknown:
            end = backing_offset or self.cluster_size
            names = incompatible_names(cluster, self.header_length, end)
            raise ImageUnsupported(
                f"Unsupported qcow2 feature(s): {describe_features(unknown, names)}",
                format="qcow2",
                structure="header",
                field="incompatible_features",
                offset=72,
            )
        if self.extended_l2 and self.cluster_size < 1 << 14:
            raise header_error(
                f"Unsupported subcluster size: {self.cluster_size // 32}",
                "incompatible_features",
                72,
            )
        if self.refcount_order > 6:
            raise header_error(
                "Reference count entry width too large; may not exceed 64 bits",
                "refcount_order",
                96,
            )

    def _check_tables(self, check: bool) -> None:
        bits = self.cluster_bits
        if self.refcount_table_clusters << bits > MAX_REFCOUNT_TABLE:
            raise header_error(
                "Reference count table too large", "refcount_table_clusters", 56
            )
        if self.refcount_table_clusters == 0 and not check:
            raise header_error(
                "Image does not contain a reference count table", "refcount_table_clusters", 56
            )
        self._check_table(
            "Reference count table",
            self.refcount_table_offset,
            self.refcount_table_clusters << bits,
            "refcount_table_offset",
            48,
        )
        if not check or self.nb_snapshots <= MAX_SNAPSHOTS:
            if self.nb_snapshots > MAX_SNAPSHOTS:
                raise header_error("Snapshot table too large", "nb_snapshots", 60)
            # The shortest entry is a bare header; the true length is known after parsing.
            self._check_table(
                "Snapshot table",
                self.snapshots_offset,
                self.nb_snapshots * MIN_SNAPSHOT,
                "snapshots_offset",
                64,
            )
        if self.l1_size * 8 > MAX_L1:
            raise header_error("Active L1 table too large", "l1_size", 36)
        self._check_table(
            "Active L1 table", self.l1_table_offset, self.l1_size * 8, "l1_table_offset", 40
        )
        needed = self.l1_entries_needed
        if needed > MAX_INT:
            raise header_error("Image is too big", "size", 24)
        if self.l1_size < needed:
            raise header_error("L1 table is too small", "l1_size", 36)

    def _check_table(
        self, name: str, offset: int, length: int, field: str, field_offset: int
    ) -> None:
        if not is_valid_table(offset, length, self.cluster_size):
            raise header_error(f"{name} offset invalid", field, field_offset)

    def _parse_extensions(self, cluster: bytes, backing_offset: int) -> None:
        if self.crypt_method > CRYPT_LUKS:
            raise header_error(
                f"Unsupported encryption method {self.crypt_method}", "crypt_method", 32
            )
        end = backing_offset or self.cluster_size
        for type, data, offset in split_extensions(cluster, self.header_length, end):
            if type == EXT_BACKING_FORMAT:
                if len(data) >= 16:
                    raise header_error(
                        f"ERROR: ext_backing_format: len={len(data)} too large (>=16)",
                        "backing format",
                        offset,
                    )
                self.backing_format = text_of(data)
            elif type == EXT_DATA_FILE:
                self.data_file = text_of(data)
            elif type == EXT_CRYPTO:
                if self.crypt_method != CRYPT_LUKS:
                    raise header_error(
                        "CRYPTO header extension only expected with LUKS encryption method",
                        "encryption header",
                        offset,
                    )
                self.crypto = CryptoExtension.parse(data, offset, self.cluster_size)
            elif type == EXT_BITMAPS:
                maintained = bool(self.autoclear_features & AUTOCLEAR_BITMAPS)
                self.bitmaps = BitmapsExtension.parse(
                    data, offset, self.cluster_size, maintained=maintained
                )
            elif type != EXT_FEATURE_NAMES:
                self.unknown_extensions.append((type, data))

    # -- writing -----------------------------------------------------------------------------

    def pack(self, *, feature_names: bool = True) -> bytes:
        """The header cluster's content, without padding behind it.

        ``feature_names``: with the table that tells other programs what the feature bits are.
        Raises ImageUnsupported (ENOSPC) if extensions and the backing file's name do not fit.
        """
        extensions = b"".join(
            pack_extension(t, data) for t, data in self._to_extensions(feature_names)
        )
        extensions += pack_extension(EXT_END, b"")
        name = b"" if self.backing_file is None else bytes_of(self.backing_file)
        name_offset = self.header_length + len(extensions)
        fixed = _V2.pack(
            MAGIC,
            self.version,
            name_offset if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            fixed += _V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                self.header_length,
            )
            known = bytes([self.compression_type]).ljust(V3_LENGTH - V3_MIN_LENGTH, b"\0")
            fixed += (known + self.unknown_tail)[: self.header_length - V3_MIN_LENGTH]
        packed = fixed + extensions + name
        if len(name) > MAX_BACKING_NAME:
            raise ImageUnsupported("Invalid argument", structure="header", errno=errno.EINVAL)
        if len(packed) > self.cluster_size:
            raise ImageUnsupported(
                "No space left on device", structure="header", errno=errno.ENOSPC
            )
        return packed

    def _to_extensions(self, feature_names: bool) -> list[tuple[int, bytes]]:
        """In QEMU's order."""
        result = []
        if self.backing_format:
            result.append((EXT_BACKING_FORMAT, bytes_of(self.backing_format)))
        if self.data_file is not None:
            result.append((EXT_DATA_FILE, bytes_of(self.data_file)))
        if self.crypto is not None:
            result.append((EXT_CRYPTO, self.crypto.pack()))
        # Small clusters need their room for the backing file's name.
        if feature_names and self.version >= 3 and self.cluster_size > NAMES_NEED_MORE_THAN:
            result.append((EXT_FEATURE_NAMES, pack_feature_names()))
        if self.bitmaps is not None:
            result.append((EXT_BITMAPS, self.bitmaps.pack()))
        return result + self.unknown_extensions


MAX_INT = (1 << 31) - 1
"""QEMU counts the entries of an L1 table in a signed 32-bit number."""


def l1_entries_for(size: int, cluster_bits: int, l2_entries: int) -> int:
    """L1 entries that cover ``size`` guest bytes."""
    return -(-size // (l2_entries << cluster_bits))


def is_valid_table(offset: int, length: int, cluster_size: int) -> bool:
    """A table at ``offset`` is cluster-aligned and ends below 2^63."""
    return offset % cluster_size == 0 and offset + length <= MAX_OFFSET


# -- compressed cluster descriptors --------------------------------------------------------------


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, bytes that may belong to it) of a compressed L2 entry.

    "Compressed Clusters Descriptor": the length is an upper bound, to the end of the last of the
    512-byte sectors.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = (entry & (COMPRESSED - 1)) >> shift
    return offset, (sectors + 1) * 512 - (offset & 511)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at ``offset``."""
    shift = 62 - (cluster_bits - 8)
    additional = (offset + length - 1) // 512 - offset // 512
    return COMPRESSED | additional << shift | offset
