"""``rebase``: give an image another backing file, and keep what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    Option,
    Parsed,
    WrongUsage,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import (
    check_cache_mode,
    check_format_options,
    open_image,
)
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.tools.progress import Progress

COMMAND = Command(
    "[-f FMT | --image-opts] [-t CACHE] [-q] [-U] [-p] "
    "[-b BACKING [-F BACKING_FMT] [-T BACKING_CACHE]] [-u] [--object OBJDEF] [-c] FILENAME",
    (
        HELP,
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Option("t", "cache", "CACHE", "cache mode of FILENAME (writeback)"),
        Option("b", "backing", "BACKING", "the new backing file; an empty name for none"),
        Option("F", "backing-format", "BACKING_FMT", "format of BACKING"),
        Option("T", "backing-cache", "CACHE", "cache mode of the backing files (writeback)"),
        Option("u", "backing-unsafe", help="change the name alone, whatever BACKING holds"),
        Option("c", "compress", help="compress what is copied"),
        FORCE_SHARE,
        OBJECT,
    ),
    (("FILENAME", "the image"),),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    filename = image_name(given)
    unsafe = given.flag("backing-unsafe")
    if not unsafe and not given.flag("backing"):
        raise WrongUsage("Must specify backing file (-b) or use unsafe mode (-u)")
    check_format_options(given)
    cache = check_cache_mode(given.value("cache", "writeback"))
    backing_cache = check_cache_mode(given.value("backing-cache", "writeback"), source=True)

    from lamina.tools.progress import Progress

    with (
        Progress(given.flag("progress"), quiet=given.flag("quiet")) as progress,
        open_image(
            tool,
            filename,
            format=given.value("format"),
            image_opts=given.flag("image-opts"),
            writable=True,
            cache=cache,
            backing=not unsafe,
        ) as disk,
    ):
        if given.flag("compress") and not disk.node.supports_compressed_writes:
            raise UsageError("Compression not supported for this file format")
        _check_backing_format(given.value("backing-format"))
        if not unsafe:
            _copy_difference(tool, given, disk, backing_cache, progress)
        _change_name(given, disk)
    return EXIT_OK


def _check_backing_format(name: str | None) -> None:
    from lamina.block import registry

    if name is not None and not registry.is_known(name):
        raise UsageError(f"Invalid format name: '{name}'")


def _copy_difference(
    tool: Tool, given: Parsed, disk: Backend, cache: str, progress: Progress
) -> None:
    from lamina.block import registry
    from lamina.block.filenames import combine, is_absolute, is_json
    from lamina.jobs.rebase import rebase

    name = given.value("backing")
    filename = disk.node.filename
    if name and is_json(filename) and not is_absolute(name):
        raise UsageError(
            "Could not resolve backing filename: "
            f"Cannot use relative backing file names for '{filename}'"
        )
    with ExitStack() as stack:
        new = None
        if name:
            new = stack.enter_context(
                open_image(
                    tool,
                    combine(filename, name),
                    format=given.value("backing-format"),
                    cache=cache,
                    force_share=given.flag("force-share"),
                    prefix=f"Could not open new backing file '{name}': ",
                )
            )
        with _changing(name):
            driver = registry.driver(disk.node.driver)
            driver.check_backing_file(disk.node, name or None, _name_format(given))
        rebase(disk, new, compressed=given.flag("compress"), progress=progress)
        disk.flush()


def _change_name(given: Parsed, disk: Backend) -> None:
    from lamina.block import registry

    name = given.value("backing") or None
    node = disk.node
    with _changing(name):
        format = _name_format(given)
        registry.driver(node.driver).change_backing_file(node, name, format)


def _name_format(given: Parsed) -> str | None:
    """The format of the new backing file. Raises UsageError if there is a file without one."""
    if not given.value("backing"):
        return None
    format: str | None = given.value("backing-format")
    if format is None:
        raise UsageError("backing format must be specified")
    return format


@contextmanager
def _changing(name: str | None) -> Iterator[None]:
    """What fails in here does so because of the new backing file."""
    try:
        yield
    except LaminaError as error:
        raise error.in_context(f"Could not change the backing file to '{name or ''}': ") from None
