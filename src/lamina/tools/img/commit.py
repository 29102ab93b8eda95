"""``commit``: write what an overlay holds into its backing file."""

from __future__ import annotations

import sys

from lamina.errors import ImageUnsupported, LaminaError, UsageError
from lamina.tools.arguments import (
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    Option,
    number,
)
from lamina.tools.bitmaps import fail_to_close, store_bitmaps
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_cache_mode, check_format_options, open_given
from lamina.tools.tool import EXIT_OK, Tool

COMMAND = Command(
    "[-f FMT | --image-opts] [-t CACHE] [-b BASE] [-d] [-r RATE] [--object OBJDEF] [-q] [-p] "
    "FILENAME",
    (
        HELP,
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Option("t", "cache", "CACHE", "cache mode (writeback)"),
        Option("d", "drop", help="leave FILENAME as it is instead of emptying it"),
        Option(
            "b", "base", "BASE", "commit down to this layer of the backing chain; implies --drop"
        ),
        Option(
            "r", "rate", "RATE", "move at most so many bytes a second", number("rate limit")
        ),
        OBJECT,
    ),
    (("FILENAME", "the overlay"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    filename = image_name(given)
    check_format_options(given)
    cache = check_cache_mode(given.value("cache", "writeback"))

    from lamina.jobs.commit import commit, empty, find_layer, writable_layer
    from lamina.tools.progress import Progress

    with open_given(tool, given, filename, writable=True, cache=cache, discard="unmap") as top:
        if given.flag("base"):
            base = find_layer(top.node, given.value("base"))
            if base is None:
                raise UsageError(
                    f"Did not find '{given.value('base')}' in the backing chain of '{filename}'"
                )
        else:
            base = top.node.unfiltered.backing
            if base is None:
                raise UsageError("Image does not have a backing file")
        with (
            Progress(given.flag("progress"), quiet=given.flag("quiet")) as progress,
            writable_layer(top, base) as target,
        ):
            try:
                commit(top, target, rate=given.value("rate", 0), progress=progress)
            except LaminaError as error:
                raise error.in_context("Block job failed: ") from None
            stored = store_bitmaps(base.unfiltered, tool)
        if not stored:
            fail_to_close(tool)
        if not given.flag("drop") and not given.flag("base"):
            try:
                empty(top)
            except ImageUnsupported:
                # Then the image goes on holding what its backing file holds as well.
                pass
            except LaminaError as error:
                raise error.in_context(f"Failed to empty {top.node.filename}: ") from None
    if not given.flag("quiet"):
        sys.stdout.write("Image committed.\n")
    return EXIT_OK
