"""The name of a blkdebug node: ``blkdebug:CONFIG:IMAGE`` if that says everything, else options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.block import registry
from lamina.block.filenames import is_json, json_filename, parse_json, protocol_options
from lamina.block.node import Node

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
    below = {f"image.{key}": value for key, value in _description(image).items()}
    return json_filename({**below, "driver": "blkdebug", **own})


def _description(node: Node) -> dict[str, Any]:
    """Dotted options that open the same as ``node``."""
    if is_json(node.filename):
        return parse_json(node.filename)
    if registry.is_protocol(node.driver):
        return protocol_options(node.filename)
    below = {f"file.{key}": value for key, value in _description(node.file).items()}
    return {"driver": node.driver, **below}
