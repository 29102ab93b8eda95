"""``bench``: how fast does an image answer?"""

from __future__ import annotations

import sys

from lamina.errors import LaminaError, UsageError
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    Option,
    number,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK, Tool

_INT_MAX = (1 << 31) - 1


def _aio(text: str) -> str:
    if text not in ("threads", "native", "io_uring"):
        raise UsageError(f"Invalid aio option: {text}")
    return text


def _cache(text: str) -> str:
    from lamina.block.cache_modes import cache_mode

    try:
        cache_mode(text)
    except UsageError:
        raise UsageError("Invalid cache mode") from None
    return text


COMMAND = Command(
    "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s BUFFER_SIZE] "
    "[-S STEP_SIZE] [-i AIO] [-n] [-w [--pattern PATTERN] [--flush-interval INTERVAL "
    "[--no-drain]]] [-q] [-U] FILENAME",
    (
        HELP,
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        Option("t", "cache", "CACHE", "cache mode (writeback)", _cache),
        Option(
            "c", "count", "COUNT", "how many requests (75000)", number("request count", 1, _INT_MAX)
        ),
        Option(
            "s",
            "buffer-size",
            "BUFFER_SIZE",
            "bytes of a request (4096)",
            number("buffer size", 1, _INT_MAX),
        ),
        Option(
            "d",
            "depth",
            "DEPTH",
            "requests under way at a time (64)",
            number("queue depth", 1, _INT_MAX),
        ),
        Option("o", "offset", "OFFSET", "of the first request (0)", number("offset")),
        Option(
            "S",
            "step-size",
            "STEP_SIZE",
            "from one request to the next (BUFFER_SIZE)",
            number("step size", 0, _INT_MAX),
        ),
        Option("i", "aio", "AIO", "threads, native or io_uring: accepted, batches serve all", _aio),
        Option("n", "native", help="the same as --aio=native"),
        Option("w", "write", help="write instead of reading"),
        Option(
            "",
            "pattern",
            "PATTERN",
            "the byte that is written (0)",
            number("pattern byte", 0, 255),
        ),
        Option(
            "",
            "flush-interval",
            "INTERVAL",
            "flush after so many requests",
            number("flush interval", 0, _INT_MAX),
        ),
        Option("", "no-drain", help="let requests go on while a flush is under way"),
        FORCE_SHARE,
        OBJECT,
    ),
    (("FILENAME", "the image"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    filename = image_name(given)
    write = given.flag("write")
    depth = given.value("depth", 64)
    interval = given.value("flush-interval", 0)
    if not write and interval:
        raise UsageError("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise UsageError("Flush interval can't be smaller than depth")
    check_format_options(given)

    from lamina.jobs.bench import Settings, bench

    length = given.value("buffer-size", 4096)
    settings = Settings(
        count=given.value("count", 75000),
        depth=depth,
        offset=given.value("offset", 0),
        length=length,
        step=given.value("step-size", 0) or length,
        write=write,
        pattern=given.value("pattern", 0),
        flush_interval=interval,
    )
    native = given.flag("native") or given.value("aio") == "native"
    with open_given(
        tool,
        given,
        filename,
        writable=write,
        cache=given.value("cache", "writeback"),
        options={"file.aio": "native"} if native else None,
    ) as disk:
        sys.stdout.write(
            f"Sending {settings.count} {'write' if write else 'read'} requests, "
            f"{length} bytes each, {depth} in parallel "
            f"(starting at offset {settings.offset}, step size {settings.step})\n"
        )
        if interval:
            sys.stdout.write(f"Sending flush every {interval} requests\n")
        sys.stdout.flush()
        try:
            seconds = bench(disk, settings)
        except LaminaError as error:
            tool.error(error, prefix="Failed request: ")
            return EXIT_FAILURE
    sys.stdout.write(f"Run completed in {seconds:3.3f} seconds.\n")
    return EXIT_OK
