"""Runtime options checked against the image: sizes of caches, what to watch."""

from __future__ import annotations

from lamina.errors import ImageUnsupported, UsageError
from lamina.formats.qcow2.layout import Header
from lamina.formats.qcow2.options import (
    DEFAULT_L2_CACHE,
    MIN_REFCOUNT_CACHE_BLOCKS,
    Options,
)
from lamina.units import KIB

MAX_CACHE = 1 << 40
MIN_L2_SLICES = 2
DEFAULT_SLICE = 64 * KIB
MAX_INTERVAL = (1 << 32) - 1
"""Seconds."""


class Settings:
    def __init__(self, options: Options, header: Header) -> None:
        """Raises UsageError for options that contradict each other or the image."""
        from lamina.formats.qcow2.overlap import watched

        self.overlap = watched(options)
        self.l2_slice = _l2_slice(options, header)
        self.l2_cache, self.refcount_cache = _cache_sizes(options, header, self.l2_slice)
        if not 0 <= options.cache_clean_interval <= MAX_INTERVAL:
            raise UsageError("Cache clean interval too big")
        if options.lazy_refcounts and header.version < 3:
            raise ImageUnsupported(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            )
        if options.discard_no_unref and header.version < 3:
            raise ImageUnsupported("discard-no-unref is only supported since qcow2 version 3")
        if options.encrypt_format is not None and not header.crypt_method:
            raise UsageError(
                "No encryption in image header, but options specified format "
                f"'{options.encrypt_format}'"
            )


def _l2_slice(options: Options, header: Header) -> int:
    size = options.l2_cache_entry_size
    if size is None:
        return min(header.cluster_size, DEFAULT_SLICE)
    if not 512 <= size <= header.cluster_size or size & (size - 1):
        raise UsageError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({header.cluster_size})"
        )
    return size


def _cache_sizes(options: Options, header: Header, l2_slice: int) -> tuple[int, int]:
    """Bytes of L2 tables and of refcount blocks that are kept."""
    combined, l2, refcount = (
        options.cache_size,
        options.l2_cache_size,
        options.refcount_cache_size,
    )
    least = MIN_REFCOUNT_CACHE_BLOCKS * header.cluster_size
    # More than the whole image's tables is never needed.
    most = header.l1_size * header.cluster_size
    if combined is not None:
        if l2 is not None and refcount is not None:
            raise UsageError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if l2 is not None and l2 > combined:
            raise UsageError("l2-cache-size may not exceed cache-size")
        if refcount is not None and refcount > combined:
            raise UsageError("refcount-cache-size may not exceed cache-size")
        if l2 is not None:
            refcount = combined - l2
        elif refcount is not None:
            l2 = combined - refcount
        else:
            l2 = min(most, max(combined - least, 0))
            refcount = combined - l2
    if l2 is None:
        l2 = DEFAULT_L2_CACHE
    if refcount is None:
        refcount = least
    if refcount // header.cluster_size > (1 << 31) - 1:
        raise UsageError("Refcount cache size too big")
    return (
        min(max(l2, MIN_L2_SLICES * l2_slice), MAX_CACHE),
        min(max(refcount, least), MAX_CACHE),
    )
