"""What several commands do with bitmaps that are kept in images."""

from __future__ import annotations

from lamina.errors import LaminaError
from lamina.hints import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.tools.tool import Tool


def store_bitmaps(node: Node, tool: Tool) -> bool:
    """Bring the bitmaps of ``node`` to its image; False, and said so, if that fails."""
    from lamina.block import registry

    try:
        registry.driver(node.driver).store_bitmaps(node)
    except LaminaError as error:
        tool.error(
            f"Lost persistent bitmaps during inactivation of node '{node.name}': {error}"
        )
        return False
    return True


def fail_to_close(tool: Tool) -> NoReturn:
    """End the command for which bitmaps could not be stored."""
    tool.fail("Error while closing the image: Invalid argument")
