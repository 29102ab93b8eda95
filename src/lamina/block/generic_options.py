"""The options that every node has, whatever its driver is."""

from __future__ import annotations

from lamina.block.node import NodeOptions
from lamina.block.options import Spec, Type, convert
from lamina.errors import UsageError
from lamina.hints import Any
from lamina.records import replace

_BOOLS = {
    "read-only": "read_only",
    "auto-read-only": "auto_read_only",
    "force-share": "force_share",
    "cache.direct": "direct",
    "cache.no-flush": "no_flush",
}
_DISCARD = {"off": False, "ignore": False, "on": True, "unmap": True}
_DETECT_ZEROES = ("off", "on", "unmap")


def generic_options(
    options: dict[str, Any], defaults: NodeOptions
) -> tuple[NodeOptions, dict[str, Any]]:
    """The options that every node has, and the others."""
    changes: dict[str, Any] = {}
    for key, name in _BOOLS.items():
        if key in options:
            changes[name] = convert(Spec(key, Type.BOOL, ""), options.pop(key))
    if "node-name" in options:
        changes["node_name"] = str(options.pop("node-name"))
    if "discard" in options:
        word = options.pop("discard")
        if word not in _DISCARD:
            raise UsageError("Invalid discard option")
        changes["unmap"] = _DISCARD[word]
    if "detect-zeroes" in options:
        word = options.pop("detect-zeroes")
        if word not in _DETECT_ZEROES:
            raise UsageError(f"invalid parameter value: {word}")
        changes["detect_zeroes"] = word
    settings = replace(defaults, **changes)
    if settings.detect_zeroes == "unmap" and not settings.unmap:
        raise UsageError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation "
            "to unmap"
        )
    if settings.force_share and not settings.read_only:
        raise UsageError("force-share=on can only be used with read-only images")
    return settings, options


def below_format(settings: NodeOptions) -> NodeOptions:
    """Defaults for a format's children: the format itself decides about discards and zeroes."""
    return replace(
        settings, node_name="", filename="", unmap=True, detect_zeroes="off", probed=False
    )
