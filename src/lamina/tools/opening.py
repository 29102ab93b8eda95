"""Opening images as the command line says."""

from __future__ import annotations

from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.tools.arguments import Parsed
    from lamina.tools.tool import Tool


def check_format_options(given: Parsed) -> None:
    """``--image-opts`` names the format itself. Raises UsageError."""
    if given.flag("image-opts") and given.flag("format"):
        raise UsageError("--image-opts and --format are mutually exclusive")


def check_cache_mode(name: str, *, source: bool = False) -> str:
    """``name``, if it is a cache mode. Raises UsageError."""
    from lamina.block.cache_modes import cache_mode

    try:
        cache_mode(name)
    except UsageError:
        what = "source cache" if source else "cache"
        raise UsageError(f"Invalid {what} option: {name}") from None
    return name


def open_image(
    tool: Tool,
    name: str,
    *,
    format: str | None = None,
    image_opts: bool = False,
    prefix: str | None = None,
    **how: Any,
) -> Backend:
    """``Backend.open`` with ``Could not open 'name': `` (or ``prefix``) before its errors.

    ``how``: writable, cache, force_share, inspect, check, backing, … of ``Backend.open``.
    """
    from lamina.block.backend import Backend

    try:
        return Backend.open(
            name, session=tool.session, format=format, image_opts=image_opts, **how
        )
    except LaminaError as error:
        raise error.in_context(f"Could not open '{name}': " if prefix is None else prefix) from None


def open_given(tool: Tool, given: Parsed, name: str, **how: Any) -> Backend:
    """The image ``name`` as ``--format``, ``--image-opts`` and ``--force-share`` say."""
    return open_image(
        tool,
        name,
        format=given.value("format"),
        image_opts=given.flag("image-opts"),
        force_share=given.flag("force-share"),
        **how,
    )


def load_snapshot(source: Backend, wanted: str) -> None:
    """Show what an internal snapshot holds, for reading only.

    ``wanted``: an id or a name, or ``snapshot.id=…,snapshot.name=…``.
    """
    from lamina.block import registry
    from lamina.block.keyvalue import parse_keyvalue

    if wanted.startswith("snapshot."):
        said = parse_keyvalue(wanted)
        wanted = str(said.get("snapshot.id", said.get("snapshot.name", "")))
    layer = source.node.unfiltered
    registry.driver(layer.driver).load_snapshot(layer, wanted)
