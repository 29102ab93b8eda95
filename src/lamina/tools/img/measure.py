"""``measure``: how large would a new image be?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OPTIONS,
    OUTPUT,
    Option,
    Parsed,
    image_size,
    joined_options,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.output import to_json
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.driver import Driver

COMMAND = Command(
    "[-f FMT | --image-opts] [-o OPTIONS] [-O OUTPUT_FMT] [-l SNAPSHOT] [-U] "
    "[--output human|json] [--object OBJDEF] (--size SIZE | FILENAME)",
    (
        HELP,
        Option("O", "target-format", "OUTPUT_FMT", "format of the new image (raw)"),
        OPTIONS,
        Option("", "size", "SIZE", "measure an empty image of this size", image_size),
        FORMAT,
        IMAGE_OPTS,
        Option("l", "snapshot", "SNAPSHOT", "measure what this internal snapshot holds"),
        FORCE_SHARE,
        OBJECT,
        OUTPUT,
    ),
    (("FILENAME", "measure an image that holds what this one does"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    _check(given)
    with ExitStack() as stack:
        source: Backend | None = None
        if given.operands:
            source = stack.enter_context(open_given(tool, given, given.operands[0]))
            if given.flag("snapshot"):
                _load_snapshot(source, given.value("snapshot"))
        driver, options = _target(tool, given, source.size if source else given.value("size"))
        measured = driver.measure(options, source.node if source else None, _Context(tool))
    if given.value("output", False):
        value = {} if measured.bitmaps is None else {"bitmaps": measured.bitmaps}
        value["required"] = measured.required
        value["fully-allocated"] = measured.fully_allocated
        text = to_json(value)
    else:
        text = f"required size: {measured.required}\n"
        text += f"fully allocated size: {measured.fully_allocated}"
        if measured.bitmaps is not None:
            text += f"\nbitmaps size: {measured.bitmaps}"
    sys.stdout.write(text + "\n")
    return EXIT_OK


def _check(given: Parsed) -> None:
    """Raises UsageError unless there is either an image or a size."""
    if len(given.operands) > 1:
        raise UsageError("At most one filename argument is allowed.")
    if not given.operands and any(map(given.flag, ("image-opts", "format", "snapshot"))):
        raise UsageError("--image-opts, -f, and -l require a filename argument.")
    if not given.operands and not given.flag("size"):
        raise UsageError("Either --size N or one filename must be specified.")
    if given.operands and given.flag("size"):
        raise UsageError("--size N cannot be used together with a filename.")
    check_format_options(given)


def _load_snapshot(source: Backend, name: str) -> None:
    from lamina.block import registry

    layer = source.node.unfiltered
    try:
        registry.driver(layer.driver).load_snapshot(layer, name)
    except LaminaError as error:
        raise error.in_context("Failed to load snapshot: ") from None


def _target(tool: Tool, given: Parsed, size: int) -> tuple[Driver, Any]:
    """The driver of the new image, and its creation options with ``size`` in them."""
    from lamina.block import registry
    from lamina.block.creation import SIZE, creation_options
    from lamina.block.keyvalue import parse_keyvalue
    from lamina.block.options import parse

    name = given.value("target-format", "raw")
    known = {spec.key for spec in creation_options(name, "")}
    driver = registry.driver(name)
    assert driver.CreateOptions is not None
    settled: Any
    try:
        options = parse_keyvalue(joined_options(given))
        for key in options:
            if key not in known:
                raise UsageError(f"Invalid parameter '{key}'", field=key)
        settled, _ = parse(driver.CreateOptions, {**options, SIZE: size})
    except UsageError as error:
        tool.error(error)
        raise UsageError(f"Invalid options for file format '{name}'") from None
    return driver, settled


class _Context:
    """A ``CreateContext`` for an image that nobody creates."""

    filename = ""

    def __init__(self, tool: Tool) -> None:
        self.secrets = tool.session.secrets
        self.warn: Callable[[str], None] = tool.tell

    def backing_node(self, *, needed: bool = False) -> None:
        return None

    def create_beside(self, filename: str, size: int, *, from_here: bool = False) -> Any:
        raise AssertionError("measuring creates nothing")
