"""Exchanging the runtime options of an image that is open and in use."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.block.options import convert, specs
from lamina.errors import UsageError
from lamina.formats.qcow2.header import close_cleanly, is_lazy
from lamina.formats.qcow2.mapping import Qcow2Mapping
from lamina.formats.qcow2.options import Options
from lamina.formats.qcow2.settings import Settings
from lamina.hints import Any
from lamina.records import replace

_FIXED = frozenset({"encrypt.format", "encrypt.key-secret", "l2-cache-entry-size"})
"""How data is encrypted and how tables are kept cannot change under way."""


def reconfigure(mapping: Qcow2Mapping, changes: Mapping[str, Any], *, unmap: bool) -> None:
    """Adopt ``changes`` (keys as users write them), and whether discards are wanted at all.

    Raises UsageError, and changes nothing, for options that contradict each other or the image, or
    that cannot change.
    """
    options = _changed(mapping.options, changes)
    settings = Settings(options, mapping.header)
    if is_lazy(mapping) and mapping.metadata.lazy_counts and options.lazy_refcounts is False:
        # Refcounts that were put off are due, and then nothing is dirty any more.
        close_cleanly(mapping)
        mapping.metadata.commit(counts=True)
    mapping.options, mapping.settings, mapping.unmap = options, settings, unmap
    mapping.overlap.watched = settings.overlap
    mapping.overlap.forget()
    mapping.tables.cache.capacity = settings.l2_cache
    if not mapping.read_only:
        mapping.refcounts.cache.capacity = settings.refcount_cache
        mapping.allocator.configure(options, unmap=unmap)


def _changed(options: Options, changes: Mapping[str, Any]) -> Options:
    known = {spec.key: (name, spec) for name, spec in specs(Options).items()}
    values = {}
    for key, value in changes.items():
        name, spec = known.get(key, ("", None))
        new = None if spec is None else convert(spec, value)
        if spec is None or (key in _FIXED and new != getattr(options, name)):
            raise UsageError(f"Cannot change the option '{key}'", field=key)
        values[name] = new
    return replace(options, **values)
