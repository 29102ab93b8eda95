"""``amend``: change options of the format of an existing image."""

from __future__ import annotations

import sys

from lamina.errors import ImageUnsupported, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.arguments import (
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OPTIONS,
    PROGRESS,
    QUIET,
    Option,
    WrongUsage,
    joined_options,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_cache_mode, check_format_options, open_given
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.block.driver import Driver

COMMAND = Command(
    "[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q] [--object OBJDEF] -o OPTIONS FILENAME",
    (
        HELP,
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Option("t", "cache", "CACHE", "cache mode (writeback)"),
        Option("", "force", help="allow what may lose the image: erasing its last key"),
        OPTIONS,
        OBJECT,
    ),
    (("FILENAME", "the image"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    if not given.flag("options"):
        raise WrongUsage("Must specify options (-o)")
    from lamina.block import registry
    from lamina.block.keyvalue import has_help, parse_keyvalue

    options = joined_options(given)
    format = given.value("format")
    if format is not None and has_help(options):
        if not registry.is_known(format):
            raise UsageError(f"Unknown file format '{format}'")
        return _show_options(registry.driver(format))
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    check_format_options(given)
    cache = check_cache_mode(given.value("cache", "writeback"))
    with open_given(tool, given, given.operands[0], writable=True, cache=cache) as image:
        layer = image.node.unfiltered
        driver = registry.driver(layer.driver)
        if has_help(options):
            return _show_options(driver)
        settled = _settle(driver, parse_keyvalue(options))

        from lamina.tools.progress import Progress

        with Progress(given.flag("progress"), quiet=given.flag("quiet")) as progress:
            driver.amend(layer, settled, progress, force=given.flag("force"))
    return EXIT_OK


def _amend_options(driver: Driver) -> type:
    if driver.AmendOptions is None:
        raise ImageUnsupported(
            f"Format driver '{driver.name}' does not support option amendment"
        )
    return driver.AmendOptions


def _show_options(driver: Driver) -> int:
    from lamina.block.options import specs

    lines = [f"Amend options for '{driver.name}':"]
    for spec in sorted(specs(_amend_options(driver)).values(), key=lambda spec: spec.key):
        lines.append(f"  {f'{spec.key}=<{spec.type.value}>':<22} - {spec.help}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def _settle(driver: Driver, given: dict[str, str]) -> Any:
    """An instance of the driver's ``AmendOptions``. Raises UsageError for what it does not take."""
    from lamina.block.options import parse, specs

    settled: Any
    settled, unknown = parse(_amend_options(driver), given)
    for key in unknown:
        creates = driver.CreateOptions is not None and any(
            spec.key == key for spec in specs(driver.CreateOptions).values()
        )
        hint = "This option is only supported for image creation" if creates else None
        raise UsageError(f"Invalid parameter '{key}'", field=key, hint=hint)
    return settled
