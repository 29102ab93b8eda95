"""The options of qcow2: how an image is used, and how one is created."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.hints import Any
from lamina.records import dataclass
from lamina.units import KIB, MIB

OVERLAP_MODES = ("none", "constant", "cached", "all")
OVERLAP_ITEMS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)


def _overlap(item: str) -> Any:
    return option(
        f"overlap-check.{item}", Type.BOOL, None, f"Check for unintended writes into {item}"
    )


@dataclass(frozen=True)
class Options:
    """How an image is used while it is open. None: not given."""

    lazy_refcounts: bool | None = option(
        "lazy-refcounts", Type.BOOL, None, "Postpone refcount updates"
    )
    pass_discard_request: bool | None = option(
        "pass-discard-request", Type.BOOL, None, "Pass guest discard requests to the layer below"
    )
    pass_discard_snapshot: bool = option(
        "pass-discard-snapshot",
        Type.BOOL,
        True,
        "Generate discard requests when snapshot related space is freed",
    )
    pass_discard_other: bool = option(
        "pass-discard-other",
        Type.BOOL,
        False,
        "Generate discard requests when other clusters are freed",
    )
    discard_no_unref: bool = option(
        "discard-no-unref", Type.BOOL, False, "Do not unreference discarded clusters"
    )
    overlap_check: str | None = option(
        "overlap-check",
        Type.STRING,
        None,
        "Selects which overlap checks to perform from a range of templates "
        "(none, constant, cached, all)",
    )
    overlap_check_template: str | None = option(
        "overlap-check.template", Type.STRING, None, "The same, beside the single switches"
    )
    overlap_main_header: bool | None = _overlap("main-header")
    overlap_active_l1: bool | None = _overlap("active-l1")
    overlap_active_l2: bool | None = _overlap("active-l2")
    overlap_refcount_table: bool | None = _overlap("refcount-table")
    overlap_refcount_block: bool | None = _overlap("refcount-block")
    overlap_snapshot_table: bool | None = _overlap("snapshot-table")
    overlap_inactive_l1: bool | None = _overlap("inactive-l1")
    overlap_inactive_l2: bool | None = _overlap("inactive-l2")
    overlap_bitmap_directory: bool | None = _overlap("bitmap-directory")
    cache_size: int | None = option(
        "cache-size", Type.SIZE, None, "Maximum combined metadata (L2 tables and refcount blocks) "
        "cache size"
    )
    l2_cache_size: int | None = option(
        "l2-cache-size", Type.SIZE, None, "Maximum L2 table cache size"
    )
    l2_cache_entry_size: int | None = option(
        "l2-cache-entry-size", Type.SIZE, None, "Size of each entry in the L2 cache"
    )
    refcount_cache_size: int | None = option(
        "refcount-cache-size", Type.SIZE, None, "Maximum refcount block cache size"
    )
    cache_clean_interval: int = option(
        "cache-clean-interval",
        Type.NUMBER,
        600,
        "Clean unused cache entries after this time (in seconds)",
    )
    encrypt_format: str | None = option("encrypt.format", Type.STRING, None, "Encryption format")
    encrypt_key_secret: str | None = option(
        "encrypt.key-secret", Type.STRING, None, "ID of the secret that holds the passphrase"
    )


DEFAULT_CLUSTER_SIZE = 64 * KIB
DEFAULT_L2_CACHE = 32 * MIB
MIN_REFCOUNT_CACHE_BLOCKS = 4


@dataclass(frozen=True)
class CreateOptions:
    """How a new image is laid out."""

    encryption: bool | None = option(
        "encryption",
        Type.BOOL,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    )
    encrypt_format: str | None = option(
        "encrypt.format", help="Encrypt the image, format choices: 'aes', 'luks'"
    )
    encrypt_key_secret: str | None = option(
        "encrypt.key-secret", help="ID of secret providing qcow AES key or LUKS passphrase"
    )
    encrypt_cipher_alg: str | None = option(
        "encrypt.cipher-alg", help="Name of encryption cipher algorithm"
    )
    encrypt_cipher_mode: str | None = option(
        "encrypt.cipher-mode", help="Name of encryption cipher mode"
    )
    encrypt_ivgen_alg: str | None = option(
        "encrypt.ivgen-alg", help="Name of IV generator algorithm"
    )
    encrypt_ivgen_hash_alg: str | None = option(
        "encrypt.ivgen-hash-alg", help="Name of IV generator hash algorithm"
    )
    encrypt_hash_alg: str | None = option(
        "encrypt.hash-alg", help="Name of encryption hash algorithm"
    )
    encrypt_iter_time: int | None = option(
        "encrypt.iter-time", Type.NUMBER, None, "Time to spend in PBKDF in milliseconds"
    )
    cluster_size: int = option(
        "cluster_size", Type.SIZE, DEFAULT_CLUSTER_SIZE, "qcow2 cluster size", listed=True
    )
    extended_l2: bool = option(
        "extended_l2", Type.BOOL, False, "Extended L2 tables", listed=True
    )
    preallocation: str | None = option(
        "preallocation", help="Preallocation mode (allowed values: off, metadata, falloc, full)"
    )
    compression_type: str = option(
        "compression_type",
        Type.STRING,
        "zlib",
        "Compression method used for image cluster compression",
        listed=True,
    )
    size: int = option("size", Type.SIZE, None, "Virtual disk size", listed=True)
    compat: str | None = option("compat", help="Compatibility level (v2 [0.10] or v3 [1.1])")
    backing_file: str | None = option("backing_file", help="File name of a base image")
    backing_fmt: str | None = option("backing_fmt", help="Image format of the base image")
    data_file: str | None = option("data_file", help="File name of an external data file")
    data_file_raw: bool | None = option(
        "data_file_raw",
        Type.BOOL,
        None,
        "The external data file must stay valid as a raw image",
    )
    lazy_refcounts: bool = option(
        "lazy_refcounts", Type.BOOL, False, "Postpone refcount updates", listed=True
    )
    refcount_bits: int = option(
        "refcount_bits",
        Type.NUMBER,
        16,
        "Width of a reference count entry in bits",
        listed=True,
    )


@dataclass(frozen=True)
class AmendOptions:
    """What can be changed in an existing image. None: leave it as it is."""

    backing_file: str | None = option("backing_file", help="File name of a base image")
    backing_fmt: str | None = option("backing_fmt", help="Image format of the base image")
    compat: str | None = option("compat", help="Compatibility level (v2 [0.10] or v3 [1.1])")
    data_file: str | None = option("data_file", help="File name of an external data file")
    data_file_raw: bool | None = option(
        "data_file_raw",
        Type.BOOL,
        None,
        "The external data file must stay valid as a raw image",
    )
    encrypt_iter_time: int | None = option(
        "encrypt.iter-time", Type.NUMBER, None, "Time to spend in PBKDF in milliseconds"
    )
    encrypt_keyslot: int | None = option(
        "encrypt.keyslot", Type.NUMBER, None, "Select a single keyslot to modify explicitly"
    )
    encrypt_new_secret: str | None = option(
        "encrypt.new-secret",
        help="New secret to set in the matching keyslots. Empty string to erase",
    )
    encrypt_old_secret: str | None = option(
        "encrypt.old-secret", help="Select all keyslots that match this password"
    )
    encrypt_state: str | None = option(
        "encrypt.state", help="Select new state of affected keyslots (active/inactive)"
    )
    lazy_refcounts: bool | None = option(
        "lazy_refcounts", Type.BOOL, None, "Postpone refcount updates"
    )
    refcount_bits: int | None = option(
        "refcount_bits", Type.NUMBER, None, "Width of a reference count entry in bits"
    )
    size: int | None = option("size", Type.SIZE, None, "Virtual disk size")
