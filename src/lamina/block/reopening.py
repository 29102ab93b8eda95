"""Changing the runtime options of nodes that are open and in use."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.block import registry
from lamina.block.generic_options import generic_options
from lamina.block.keyvalue import flatten, subset
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.node import Node

_FIXED = ("driver", "node-name", "filename", "force-share", "cache.direct", "read-only")
"""May be repeated, but not changed. (``Node.reopen`` switches between reading and writing.)"""


def change_options(node: Node, options: Mapping[str, Any]) -> None:
    """Change options of ``node`` and, under ``file.…`` and the like, of its children.

    Those that are not mentioned stay. Raises UsageError; then nothing has changed, unless it was
    one of several nodes that refused.
    """
    given = flatten(options)
    for role, attachment in node.children.items():
        below = subset(given, f"{role}.")
        for key in below:
            del given[f"{role}.{key}"]
        if below:
            change_options(attachment.node, below)
    _check_fixed(node, given)
    before = node.options
    settings, own = generic_options(given, before)
    node.options = replace(
        before,
        no_flush=settings.no_flush,
        unmap=settings.unmap,
        detect_zeroes=settings.detect_zeroes,
        auto_read_only=settings.auto_read_only,
    )
    if not own and node.options == before:
        return
    try:
        registry.driver(node.driver).reconfigure(node, own)
    except BaseException:
        node.options = before
        raise


def _check_fixed(node: Node, given: dict[str, Any]) -> None:
    """Take the options that cannot change out of ``given``. Raises UsageError if they would."""
    settings, _ = generic_options(dict(given), node.options)
    now = {
        "driver": (str(given.get("driver")), node.driver),
        "node-name": (settings.node_name, node.options.node_name),
        "filename": (str(given.get("filename")), node.filename),
        "force-share": (settings.force_share, node.options.force_share),
        "cache.direct": (settings.direct, node.options.direct),
        "read-only": (settings.read_only, node.options.read_only),
    }
    for key in _FIXED:
        if key in given:
            wanted, actual = now[key]
            if wanted != actual:
                raise UsageError(f"Cannot change the option '{key}'", field=key)
            del given[key]
