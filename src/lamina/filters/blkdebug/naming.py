"""The name of a blkdebug node: ``blkdebug:CONFIG:IMAGE`` if that says everything, else options."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.block import registry
from lamina.block.filenames import description, is_json, json_filename
from lamina.block.node import Node
from lamina.hints import Any

_IN_PLAIN_NAME = ("config", "x-image")


def name_of(image: Node, given: Mapping[str, Any]) -> str:
    """``given``: the dotted options of the node as the user wrote them."""
    own = {
        key: value
        for key, value in given.items()
        if key not in ("driver", "image", "x-image") and not key.startswith("image.")
    }
    plain = registry.is_protocol(image.driver) and not is_json(image.filename)
    if plain and own.keys() <= set(_IN_PLAIN_NAME):
        return f"blkdebug:{own.get('config', '')}:{image.filename}"
    below = {f"image.{key}": value for key, value in description(image).items()}
    return json_filename({**below, "driver": "blkdebug", **own})
