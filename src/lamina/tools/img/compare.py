"""``compare``: do two images hold the same?"""

from __future__ import annotations

import sys

from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import (
    FORCE_SHARE,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    GetoptError,
    Option,
    Parsed,
    WrongUsage,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_cache_mode, open_image
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.jobs.compare import Result

EXIT_DIFFERENT = 1
EXIT_TROUBLE = 2
EXIT_STATUS_UNKNOWN = 3
EXIT_UNREADABLE = 4

COMMAND = Command(
    "[--image-opts | [-f FMT] [-F FMT]] [-s] [-T CACHE] [-p] [-q] [-U] [--object OBJDEF] "
    "FILENAME1 FILENAME2",
    (
        HELP,
        QUIET,
        PROGRESS,
        Option("f", "a-format", "FMT", "format of FILENAME1; found out by looking if not given"),
        Option("F", "b-format", "FMT", "format of FILENAME2"),
        IMAGE_OPTS,
        Option("s", "strict", help="sizes and allocation have to agree as well"),
        Option("T", "cache", "CACHE", "cache mode of both images (writeback)"),
        FORCE_SHARE,
        OBJECT,
    ),
    (("FILENAME1, FILENAME2", "the images"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    try:
        given = COMMAND.parse(arguments, tool)
        if len(given.operands) != 2:
            raise WrongUsage("Expecting two image file names")
        cache = check_cache_mode(given.value("cache", "writeback"), source=True)
        formats = (given.value("a-format"), given.value("b-format"))
        if given.flag("image-opts") and any(formats):
            raise UsageError("--image-opts and --format are mutually exclusive")
        with (
            _open(tool, given, 0, formats[0], cache) as one,
            _open(tool, given, 1, formats[1], cache) as other,
        ):
            return _compare(tool, given, one, other)
    except (GetoptError, WrongUsage):
        raise
    except LaminaError as error:
        tool.error(error)
        return EXIT_TROUBLE


def _open(tool: Tool, given: Parsed, number: int, format: str | None, cache: str) -> Backend:
    return open_image(
        tool,
        given.operands[number],
        format=format,
        image_opts=given.flag("image-opts"),
        cache=cache,
        force_share=given.flag("force-share"),
    )


def _compare(tool: Tool, given: Parsed, one: Backend, other: Backend) -> int:
    from lamina.jobs import compare
    from lamina.tools.progress import Progress

    quiet = given.flag("quiet")

    def say(text: str) -> None:
        if not quiet:
            sys.stdout.write(text + "\n")

    try:
        with Progress(given.flag("progress"), quiet=quiet) as progress:
            settings = compare.Settings(
                strict=given.flag("strict"),
                progress=progress,
                sizes_differ=lambda: say("Warning: Image size mismatch!"),
            )
            result = compare.compare(one, other, settings)
            if result is None:
                progress(1.0)
            say(_sentence(result))
            progress.stop()
    except compare.StatusUnknown as error:
        tool.error(f"Sector allocation test failed for {given.operands[error.number]}")
        return EXIT_STATUS_UNKNOWN
    except compare.ReadFailed as error:
        name = given.operands[error.number]
        tool.error(f"Error while reading offset {error.offset} of {name}: {error}")
        return EXIT_UNREADABLE
    return EXIT_OK if result is None else EXIT_DIFFERENT


def _sentence(result: Result | None) -> str:
    from lamina.jobs.compare import Difference

    if result is None:
        return "Images are identical."
    return {
        Difference.SIZE: "Strict mode: Image size mismatch!",
        Difference.STATUS: f"Strict mode: Offset {result.offset} block status mismatch!",
        Difference.CONTENT: f"Content mismatch at offset {result.offset}!",
    }[result.difference]
