"""``check``: look for errors and leaks in an image, and repair them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lamina.block.driver import CheckResult, Fix
from lamina.errors import ImageUnsupported, LaminaError
from lamina.hints import Any
from lamina.records import replace
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    Option,
    WrongUsage,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_cache_mode, check_format_options, open_given
from lamina.tools.output import to_json
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK, Tool

EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_UNSUPPORTED = 63

_FIXES = {"leaks": Fix(leaks=True), "all": Fix(leaks=True, errors=True)}


def _fix(text: str) -> Fix:
    if text not in _FIXES:
        raise WrongUsage(f"--repair (-r) expects 'leaks' or 'all' not '{text}'")
    return _FIXES[text]


COMMAND = Command(
    "[-f FMT | --image-opts] [-T CACHE] [-r leaks|all] [-U] [--output human|json] "
    "[--object OBJDEF] [-q] FILENAME",
    (
        HELP,
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        Option("T", "cache", "CACHE", "cache mode (writeback)"),
        FORCE_SHARE,
        OUTPUT,
        Option("r", "repair", "leaks|all", "repair leaked space, or all that is wrong", _fix),
        OBJECT,
    ),
    (("FILENAME", "the image"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    filename = image_name(given)
    check_format_options(given)
    fix = given.value("repair", Fix())
    as_json, quiet = given.value("output", False), given.flag("quiet")
    cache = check_cache_mode(given.value("cache", "writeback"), source=True)
    how = {"writable": fix != Fix(), "check": True, "cache": cache}
    with open_given(tool, given, filename, **how) as image:
        from lamina.block import registry

        layer = image.node.unfiltered
        driver = registry.driver(layer.driver)
        try:
            result = driver.check(layer, fix, tool.tell)
            if result.leaks_fixed or result.corruptions_fixed:
                if not (as_json or quiet):
                    sys.stdout.write(_repaired(result))
                result = replace(
                    driver.check(layer, Fix(), tool.tell),
                    leaks_fixed=result.leaks_fixed,
                    corruptions_fixed=result.corruptions_fixed,
                )
        except ImageUnsupported as error:
            tool.error(error)
            return EXIT_UNSUPPORTED
        except LaminaError as error:
            raise error.in_context("Check failed: ") from None
    if as_json:
        sys.stdout.write(to_json(_json_value(result, filename, driver.name)) + "\n")
    elif not quiet:
        sys.stdout.write("\n".join(_human_lines(result)) + "\n")
    if result.check_errors:
        tool.error("Check failed")
        return EXIT_FAILURE
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else EXIT_OK


def _repaired(result: CheckResult) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {result.leaks_fixed} leaked clusters\n"
        f"    {result.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now...\n"
    )


def _human_lines(result: CheckResult) -> Iterator[str]:
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"\n{result.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield f"\n{result.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        yield (
            f"{allocated}/{total} = {allocated / total:.2%} allocated, "
            f"{result.fragmented_clusters / allocated:.2%} fragmented, "
            f"{result.compressed_clusters / allocated:.2%} compressed clusters"
        )
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"


def _json_value(result: CheckResult, filename: str, format: str) -> dict[str, Any]:
    """In the order in which QEMU prints it; figures of 0 are left out but for the errors."""
    value = {
        "image-end-offset": result.image_end_offset or None,
        "compressed-clusters": result.compressed_clusters or None,
        "total-clusters": result.total_clusters or None,
        "corruptions": result.corruptions or None,
        "corruptions-fixed": result.corruptions_fixed or None,
        "check-errors": result.check_errors,
        "leaks": result.leaks or None,
        "leaks-fixed": result.leaks_fixed or None,
        "allocated-clusters": result.allocated_clusters or None,
        "filename": filename,
        "format": format,
        "fragmented-clusters": result.fragmented_clusters or None,
    }
    return {key: item for key, item in value.items() if item is not None}
