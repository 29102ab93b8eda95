"""What the tools say when asked for their version."""

from __future__ import annotations

from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.tools.tool import Tool

COMPATIBLE_WITH = "10.0.2"
"""The release of QEMU whose tools these behave as; scripts ask for it."""


def version_line(tool: Tool) -> str:
    from importlib.metadata import version

    return f"{tool.name} version {COMPATIBLE_WITH} (Lamina {version('lamina')})"
