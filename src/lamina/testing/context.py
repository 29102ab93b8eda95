"""Opening a disk on nodes that exist already, without the machinery of ``block.opening``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lamina.block.node import Node, NodeOptions
from lamina.block.secrets import Secrets
from lamina.hints import Any
from lamina.testing.memory import MemoryFile


class NodesContext:
    """An ``OpenContext`` whose children are given. ``warnings`` collects what people would see.

    A child ``data_file`` has the role ``data-file``.
    """

    def __init__(
        self,
        file: Node,
        *,
        backing: Node | None = None,
        node_options: NodeOptions | None = None,
        **children: Node,
    ) -> None:
        self.node_options = node_options or NodeOptions(
            read_only=file.read_only, unmap=True, filename=file.filename
        )
        self.secrets = Secrets()
        self.objects: Mapping[str, object] = {}
        self.warnings: list[str] = []
        self.warn: Callable[[str], None] = self.warnings.append
        self.inspect = False
        self.locked = False
        self.check = False
        self.image_option: Mapping[str, Any] = {}
        self._children: dict[str, Node | None] = {"file": file, "backing": backing}
        for name, node in children.items():
            self._children[name.replace("_", "-")] = node

    def open_child(
        self,
        role: str,
        *,
        node_options: NodeOptions | None = None,
        filename: str | None = None,
    ) -> Node:
        node = self._children[role]
        assert node is not None
        return node

    def take_options(self, prefix: str) -> dict[str, Any]:
        return {}

    def open_named(
        self,
        role: str,
        filename: str,
        *,
        driver: str | None,
        relative_to: Node,
        part: bool = False,
        plain: bool = False,
    ) -> Node | None:
        return self._children.get(role)

    def create_part(self, role: str, filename: str, *, relative_to: Node) -> Node:
        """A file in memory, from then on one of the children."""
        node = MemoryFile(options=NodeOptions(filename=filename, read_only=False))
        self._children[role] = node
        return node
