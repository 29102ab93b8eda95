"""Cache modes: one word (``-t``, ``-T``, ``--cache``) for three switches."""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import NamedTuple


class CacheMode(NamedTuple):
    writeback: bool
    """False: every write is durable when it returns."""
    direct: bool
    """Keep out of the host's page cache."""
    no_flush: bool
    """Flushes are no-ops: a crash of the host may lose everything."""


_MODES = {
    "none": CacheMode(writeback=True, direct=True, no_flush=False),
    "off": CacheMode(writeback=True, direct=True, no_flush=False),
    "directsync": CacheMode(writeback=False, direct=True, no_flush=False),
    "writeback": CacheMode(writeback=True, direct=False, no_flush=False),
    "unsafe": CacheMode(writeback=True, direct=False, no_flush=True),
    "writethrough": CacheMode(writeback=False, direct=False, no_flush=False),
}


def cache_mode(name: str) -> CacheMode:
    """Raises UsageError for a word that is none of them."""
    try:
        return _MODES[name]
    except KeyError:
        raise UsageError(f"Invalid cache option: {name}") from None
