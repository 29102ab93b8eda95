"""qcow2 on disk: bytes to dataclasses and back, every figure checked. Nothing here does I/O.

The sections named below are those of the format's specification ("The QCOW2 image format", in
QEMU's docs/interop/qcow2.txt). All integers are big-endian, all offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.records import dataclass, field
from lamina.units import MIB, round_up

MAGIC = b"QFI\xfb"

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_TABLE = 8 * MIB
MAX_L1 = 32 * MIB
MAX_SNAPSHOTS = 65536
MIN_SNAPSHOT = 40
"""Bytes of an entry of the snapshot table without extra data and names."""
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS
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

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""(word: 0 incompatible, 1 compatible, 2 autoclear; bit; name)"""

COMPRESSION_TYPES = ("zlib", "zstd")
CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2

# -- header extensions ---------------------------------------------------------------------------

EXT_END = 0x00000000
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

NAMES_NEED_MORE_THAN = 4096
"""Bytes of a cluster: QEMU writes no feature name table into smaller headers."""

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
V2_LENGTH = 72
V3_MIN_LENGTH = 104
V3_LENGTH = 112

assert _V2.size == V2_LENGTH
assert V2_LENGTH + _V3.size == V3_MIN_LENGTH


def corrupt(message: str, *, structure: str, field: str, offset: int) -> ImageCorrupt:
    """The error for a figure that no image can have."""
    return ImageCorrupt(
        message,
        format="qcow2",
        structure=structure,
        field=field,
        offset=offset,
        errno=errno.EINVAL,
    )


def _header_error(message: str, field: str, offset: int) -> ImageCorrupt:
    return corrupt(message, structure="header", field=field, offset=offset)


@dataclass
class BitmapsExtension:
    """Where the bitmap directory is ("Bitmaps extension")."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass
class CryptoExtension:
    """Where the LUKS header is ("Full disk encryption header pointer")."""

    offset: int
    length: int


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
            raise _header_error("Image is not in qcow2 format", "magic", 0)
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
            raise _header_error("qcow2 header too short", "header_length", 100)
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
            raise _header_error(
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
            raise _header_error("Invalid backing file offset", "backing_file_offset", 8)
        header._check_features(cluster, backing_offset)
        header._check_tables(check)
        header._parse_extensions(cluster, backing_offset)
        if header.crypt_method == CRYPT_LUKS and header.crypto is None:
            raise _header_error("Missing CRYPTO header for crypt method 2", "crypt_method", 32)
        if backing_offset:
            # The name ends with the first cluster, wherever it starts.
            if backing_size > min(MAX_BACKING_NAME, header.cluster_size - backing_offset):
                raise _header_error("Backing file name too long", "backing_file_size", 16)
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
            raise _header_error("qcow2 header too short", "header_length", 100)
        if length > self.cluster_size:
            raise _header_error("qcow2 header exceeds cluster size", "header_length", 100)
        if length > V3_MIN_LENGTH:
            self.compression_type = cluster[V3_MIN_LENGTH] if len(cluster) > V3_MIN_LENGTH else 0
        self.unknown_tail = cluster[V3_LENGTH:length].ljust(max(0, length - V3_LENGTH), b"\0")

    def _check_features(self, cluster: bytes, backing_offset: int) -> None:
        if self.compression_type >= len(COMPRESSION_TYPES):
            raise _header_error(
                f"qcow2: unknown compression type: {self.compression_type}",
                "compression_type",
                104,
            )
        flagged = bool(self.incompatible_features & INCOMPAT_COMPRESSION)
        if bool(self.compression_type) != flagged:
            must = "must not" if flagged else "must"
            raise _header_error(
                f"qcow2: Compression type incompatible feature bit {must} be set",
                "incompatible_features",
                72,
            )
        unknown = self.incompatible_features & ~INCOMPAT_KNOWN
        if unknown:
            names = self._feature_names(cluster, backing_offset)
            raise ImageUnsupported(
                f"Unsupported qcow2 feature(s): {_describe(unknown, names)}",
                format="qcow2",
                structure="header",
                field="incompatible_features",
                offset=72,
            )
        if self.extended_l2 and self.cluster_size < 1 << 14:
            raise _header_error(
                f"Unsupported subcluster size: {self.cluster_size // 32}",
                "incompatible_features",
                72,
            )
        if self.refcount_order > 6:
            raise _header_error(
                "Reference count entry width too large; may not exceed 64 bits",
                "refcount_order",
                96,
            )

    def _check_tables(self, check: bool) -> None:
        bits = self.cluster_bits
        if self.refcount_table_clusters << bits > MAX_REFCOUNT_TABLE:
            raise _header_error(
                "Reference count table too large", "refcount_table_clusters", 56
            )
        if self.refcount_table_clusters == 0 and not check:
            raise _header_error(
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
                raise _header_error("Snapshot table too large", "nb_snapshots", 60)
            # The shortest entry is a bare header; the true length is known after parsing.
            self._check_table(
                "Snapshot table",
                self.snapshots_offset,
                self.nb_snapshots * MIN_SNAPSHOT,
                "snapshots_offset",
                64,
            )
        if self.l1_size * 8 > MAX_L1:
            raise _header_error("Active L1 table too large", "l1_size", 36)
        self._check_table(
            "Active L1 table", self.l1_table_offset, self.l1_size * 8, "l1_table_offset", 40
        )
        needed = self.l1_entries_needed
        if needed > MAX_INT:
            raise _header_error("Image is too big", "size", 24)
        if self.l1_size < needed:
            raise _header_error("L1 table is too small", "l1_size", 36)

    def _check_table(
        self, name: str, offset: int, length: int, field: str, field_offset: int
    ) -> None:
        if not is_valid_table(offset, length, self.cluster_size):
            raise _header_error(f"{name} offset invalid", field, field_offset)

    def _feature_names(self, cluster: bytes, backing_offset: int) -> dict[int, str]:
        """Names of incompatible bits, as the image's feature name table has them."""
        try:
            extensions = list(self._extensions(cluster, backing_offset))
        except ImageCorrupt:
            return {}
        names: dict[int, str] = {}
        for type, data, _ in extensions:
            if type == EXT_FEATURE_NAMES:
                for start in range(0, len(data) - 2, 48):
                    if data[start] == 0 and data[start + 1] < 64:
                        text = text_of(data[start + 2 : start + 48].split(b"\0")[0])
                        names.setdefault(data[start + 1], text)
        return names

    def _extensions(
        self, cluster: bytes, backing_offset: int
    ) -> list[tuple[int, bytes, int]]:
        """(type, data, offset) of each extension up to the end marker."""
        found = []
        end = backing_offset or self.cluster_size
        position = self.header_length
        while position < end:
            if position + 8 > end:
                raise _header_error("Header extension too large", "extension", position)
            type, length = struct.unpack(">II", cluster[position : position + 8].ljust(8, b"\0"))
            if type == EXT_END:
                break
            position += 8
            if length > end - position:
                raise _header_error("Header extension too large", "extension", position - 8)
            data = cluster[position : position + length].ljust(length, b"\0")
            found.append((type, data, position - 8))
            position += round_up(length, 8)
        return found

    def _parse_extensions(self, cluster: bytes, backing_offset: int) -> None:
        if self.crypt_method > CRYPT_LUKS:
            raise _header_error(
                f"Unsupported encryption method {self.crypt_method}", "crypt_method", 32
            )
        for type, data, offset in self._extensions(cluster, backing_offset):
            if type == EXT_BACKING_FORMAT:
                if len(data) >= 16:
                    raise _header_error(
                        f"ERROR: ext_backing_format: len={len(data)} too large (>=16)",
                        "backing format",
                        offset,
                    )
                self.backing_format = text_of(data)
            elif type == EXT_DATA_FILE:
                self.data_file = text_of(data)
            elif type == EXT_CRYPTO:
                self._parse_crypto(data, offset)
            elif type == EXT_BITMAPS:
                self._parse_bitmaps(data, offset)
            elif type != EXT_FEATURE_NAMES:
                self.unknown_extensions.append((type, data))

    def _parse_crypto(self, data: bytes, offset: int) -> None:
        if self.crypt_method != CRYPT_LUKS:
            raise _header_error(
                "CRYPTO header extension only expected with LUKS encryption method",
                "encryption header",
                offset,
            )
        if len(data) != 16:
            raise _header_error(
                f"CRYPTO header extension size {len(data)}, but expected size 16",
                "encryption header",
                offset,
            )
        start, length = struct.unpack(">QQ", data)
        if start % self.cluster_size:
            raise _header_error(
                f"Encryption header offset '{start}' is not a multiple of cluster size "
                f"'{self.cluster_size}'",
                "encryption header offset",
                offset,
            )
        self.crypto = CryptoExtension(start, length)

    def _parse_bitmaps(self, data: bytes, offset: int) -> None:
        def fail(message: str) -> ImageCorrupt:
            return _header_error(message, "bitmaps", offset)

        if len(data) != 24:
            raise fail("bitmaps_ext: Invalid extension length")
        count, reserved, size, directory = struct.unpack(">IIQQ", data)
        if not self.autoclear_features & AUTOCLEAR_BITMAPS:
            # Somebody without bitmap support wrote here: the fields cannot be relied upon.
            self.bitmaps = BitmapsExtension(count, size, directory)
            return
        if reserved:
            raise fail("bitmaps_ext: Reserved field is not zero")
        if count > MAX_BITMAPS:
            raise fail(
                f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum "
                f"of {MAX_BITMAPS}"
            )
        if count == 0:
            raise fail("found bitmaps extension with zero bitmaps")
        if directory % self.cluster_size:
            raise fail("bitmaps_ext: invalid bitmap directory offset")
        if size > MAX_BITMAP_DIRECTORY:
            raise fail(
                f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported "
                f"size ({MAX_BITMAP_DIRECTORY})"
            )
        self.bitmaps = BitmapsExtension(count, size, directory)

    # -- writing -----------------------------------------------------------------------------

    def pack(self, *, feature_names: bool = True) -> bytes:
        """The header cluster's content, without padding behind it.

        ``feature_names``: with the table that tells other programs what the feature bits are.
        Raises ImageUnsupported (ENOSPC) if extensions and the backing file's name do not fit.
        """
        extensions = b"".join(
            _pack_extension(t, data) for t, data in self._to_extensions(feature_names)
        )
        extensions += _pack_extension(EXT_END, b"")
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
            data = struct.pack(">QQ", self.crypto.offset, self.crypto.length)
            result.append((EXT_CRYPTO, data))
        # Small clusters need their room for the backing file's name.
        if feature_names and self.version >= 3 and self.cluster_size > NAMES_NEED_MORE_THAN:
            names = b"".join(
                bytes((word, bit)) + name.encode().ljust(46, b"\0")
                for word, bit, name in FEATURE_NAMES
            )
            result.append((EXT_FEATURE_NAMES, names))
        if self.bitmaps is not None:
            ext = self.bitmaps
            data = struct.pack(">IIQQ", ext.count, 0, ext.directory_size, ext.directory_offset)
            result.append((EXT_BITMAPS, data))
        return result + self.unknown_extensions


MAX_INT = (1 << 31) - 1
"""QEMU counts the entries of an L1 table in a signed 32-bit number."""


def l1_entries_for(size: int, cluster_bits: int, l2_entries: int) -> int:
    """L1 entries that cover ``size`` guest bytes."""
    return -(-size // (l2_entries << cluster_bits))


def is_valid_table(offset: int, length: int, cluster_size: int) -> bool:
    """A table at ``offset`` is cluster-aligned and ends below 2^63."""
    return offset % cluster_size == 0 and offset + length <= MAX_OFFSET


def _pack_extension(type: int, data: bytes) -> bytes:
    return struct.pack(">II", type, len(data)) + data.ljust(round_up(len(data), 8), b"\0")


def _describe(bits: int, names: dict[int, str]) -> str:
    """Incompatible features that nobody here knows, by the image's own names for them."""
    parts = []
    for bit in range(64):
        if bits >> bit & 1 and bit in names:
            parts.append(names[bit])
            bits &= ~(1 << bit)
    if bits:
        parts.append(f"Unknown incompatible feature: {bits:x}")
    return ", ".join(parts)


def text_of(data: bytes) -> str:
    """File names are bytes; what is not UTF-8 survives the way back."""
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """The other way round."""
    return text.encode("utf-8", "surrogateescape")


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
