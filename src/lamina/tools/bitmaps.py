"""What several commands do with bitmaps that are kept in images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamina.errors import LaminaError
from lamina.tools.tool import EXIT_FAILURE, Exit

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.tools.tool import Tool


def store_bitmaps(node: Node, tool: Tool) -> None:
    """Bring the bitmaps of ``node`` to its image; ends the command if that fails."""
    from lamina.block import registry

    try:
        registry.driver(node.driver).store_bitmaps(node)
    except LaminaError as error:
        tool.error(
            f"Lost persistent bitmaps during inactivation of node '{node.name}': {error}"
        )
        tool.error("Error while closing the image: Invalid argument")
        raise Exit(EXIT_FAILURE) from None
