"""``create``: a new, empty image."""

from __future__ import annotations

import sys

from lamina.errors import LaminaError
from lamina.tools.arguments import (
    HELP,
    OBJECT,
    OPTIONS,
    QUIET,
    Option,
    WrongUsage,
    image_size,
    joined_options,
)
from lamina.tools.img.command import Command
from lamina.tools.tool import EXIT_OK, Tool

COMMAND = Command(
    "[-f FMT] [-o OPTIONS] [-b BACKING [-F BACKING_FMT]] [-u] [--object OBJDEF] [-q] "
    "FILENAME [SIZE]",
    (
        HELP,
        QUIET,
        Option("f", "format", "FMT", "format of the new image (raw)"),
        OPTIONS,
        Option("b", "backing", "BACKING", "what the new image shows where it holds nothing itself"),
        Option("F", "backing-format", "BACKING_FMT", "format of BACKING"),
        Option("u", "backing-unsafe", help="do not open BACKING to see whether it is there"),
        OBJECT,
    ),
    (
        ("FILENAME", "the new image; what it held is lost"),
        ("SIZE", "of the disk, with k, M, G, T, P or E; the same as BACKING's if not given"),
    ),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    options = joined_options(given)
    format = given.value("format", "raw")
    filename = given.operands[0] if given.operands else None
    rest = given.operands[1:]
    if options:
        from lamina.block.keyvalue import has_help

        if has_help(options):
            from lamina.block.creation import options_help

            sys.stdout.write(options_help(format, filename) + "\n")
            return EXIT_OK
    if filename is None:
        raise WrongUsage("Expecting image file name")
    size = image_size(rest.pop(0)) if rest else None
    if rest:
        raise WrongUsage(f"Unexpected argument: {rest[0]}")

    from lamina.block.creation import prepare
    from lamina.block.keyvalue import parse_keyvalue

    try:
        creation = prepare(
            filename,
            format,
            session=tool.session,
            options=parse_keyvalue(options),
            size=size,
            backing_file=given.value("backing"),
            backing_format=given.value("backing-format"),
            open_backing=not given.flag("backing-unsafe"),
        )
        if not given.flag("quiet"):
            settled = " ".join(f"{key}={value}" for key, value in creation.settled())
            sys.stdout.write(f"Formatting '{filename}', fmt={format} {settled}\n")
            sys.stdout.flush()
        creation.run()
    except LaminaError as error:
        raise error.in_context(f"{filename}: ") from None
    return EXIT_OK
