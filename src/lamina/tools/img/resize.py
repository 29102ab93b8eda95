"""``resize``: make an image larger or smaller."""

from __future__ import annotations

import sys

from lamina.errors import UsageError
from lamina.tools.arguments import (
    FORMAT,
    HELP,
    IMAGE_OPTS,
    MAX_SIZE,
    OBJECT,
    QUIET,
    Option,
    WrongUsage,
    parse,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK, Tool

COMMAND = Command(
    "[-f FMT | --image-opts] [--preallocation PREALLOC] [--shrink] [--object OBJDEF] [-q] "
    "FILENAME [+-]SIZE",
    (
        HELP,
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        Option("", "preallocation", "PREALLOC", "for new space: off, metadata, falloc or full"),
        Option("", "shrink", help="allow the end of the image to be cut off, with what is there"),
        OBJECT,
    ),
    (
        ("FILENAME", "the image"),
        ("[+-]SIZE", "the new size or, with a sign, the difference, with k, M, G, T, P or E"),
    ),
)

_SHRINK_WARNING = (
    "Shrinking an image will delete all data beyond the shrunken image's end. Before performing "
    "such an operation, make sure there is no important data there."
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(_protect_negative_size(arguments), tool)
    if len(given.operands) < 2:
        raise WrongUsage("Expecting image file name and size")
    if len(given.operands) > 2:
        raise WrongUsage("Extra argument(s) in command line")
    check_format_options(given)
    filename, size_text = given.operands

    from lamina.block.limits import Preallocation

    try:
        preallocation = Preallocation(given.value("preallocation", "off"))
    except ValueError:
        raise UsageError(f"Invalid preallocation mode '{given.value('preallocation')}'") from None
    sign, size = _parse(size_text)
    with open_given(tool, given, filename, writable=True, resize=True) as image:
        old_size = image.size
        new_size = old_size + sign * size if sign else size
        if not 0 < new_size <= MAX_SIZE:
            raise UsageError("New image size must be positive")
        if new_size <= old_size and preallocation is not Preallocation.OFF:
            raise UsageError("Preallocation can only be used for growing images")
        if new_size < old_size and not given.flag("shrink"):
            tool.error("Use the --shrink option to perform a shrink operation.")
            tool.warn(_SHRINK_WARNING)
            return EXIT_FAILURE
        # New space reads as zeroes even where a longer backing file has something to show.
        image.truncate(new_size, preallocation, zeroed=True)
    if not given.flag("quiet"):
        sys.stdout.write("Image resized.\n")
    return EXIT_OK


def _protect_negative_size(arguments: list[str]) -> list[str]:
    """``-1M`` behind the name of the image is a size, although it looks like options."""
    *others, last = arguments or [""]
    if (
        last[:1] == "-"
        and last[1:2].isdigit()
        and "--" not in others
        and len(parse(others, COMMAND.options, stop_at=("help",)).operands) == 1
    ):
        return [*others, "--", last]
    return arguments


def _parse(text: str) -> tuple[int, int]:
    """-1, 0 (absolute) or 1, and bytes. Raises UsageError in the words of an option ``size``."""
    from lamina.block.options import Spec, Type, convert

    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    size: int = convert(Spec("size", Type.SIZE, ""), text[1:] if sign else text)
    return sign, size
