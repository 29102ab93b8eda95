"""What all the images that one run of a tool opens have in common."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.policy import Policy
from lamina.block.secrets import Secrets
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.node import Node


def log_warning(text: str) -> None:
    """Where warnings go unless somebody says otherwise: the logger ``lamina``."""
    import logging

    logging.getLogger("lamina").warning(text)


class Session:
    """Secrets, nodes that can be referred to by name, the opening policy, a place for warnings."""

    def __init__(
        self,
        secrets: Secrets | None = None,
        policy: Policy = Policy.ALLOW,
        warn: Callable[[str], None] = log_warning,
    ) -> None:
        self.secrets = Secrets() if secrets is None else secrets
        self.objects: dict[str, object] = {}
        """What users made beside secrets (TLS credentials, …), by id."""
        self.policy = policy
        self.warn = warn
        self._nodes: dict[str, Node] = {}

    def add_node(self, node: Node) -> None:
        """Make ``node`` known by its name. Raises UsageError if the name is taken."""
        if self._taken(node.name):
            raise UsageError(f"Duplicate nodes with node-name='{node.name}'")
        self._nodes[node.name] = node

    def node(self, name: str) -> Node:
        """The open node of that name. Raises UsageError."""
        if not self._taken(name):
            raise UsageError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self._nodes[name]

    def check_name(self, name: str) -> None:
        """Raises UsageError unless a new node may be called ``name``."""
        wellformed = name[:1].isalpha() and all(c.isalnum() or c in "-._" for c in name)
        if not wellformed or not name.isascii():
            raise UsageError(f"Invalid node-name: '{name}'")
        if len(name) > 31:
            raise UsageError("Node name too long")
        if self._taken(name):
            raise UsageError(f"Duplicate nodes with node-name='{name}'")

    def _taken(self, name: str) -> bool:
        known = self._nodes.get(name)
        return known is not None and not known.closed
