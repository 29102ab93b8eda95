"""``convert``: copy images into a new one, maybe of another format."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from lamina.block.permissions import Perm
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import (
    FORCE_SHARE,
    HELP,
    OBJECT,
    OPTIONS,
    PROGRESS,
    QUIET,
    Option,
    Parsed,
    joined_options,
    number,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_cache_mode, load_snapshot, open_image
from lamina.tools.tool import EXIT_OK, Tool
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.driver import Driver
    from lamina.jobs.convert import Settings

_MAX_SPARSE = 16 << 20
_SPARSE_SIZE = "buffer size for sparse output"


def _sparse_size(text: str) -> int:
    size = number(_SPARSE_SIZE)(text)
    if size % SECTOR or size > _MAX_SPARSE:
        raise UsageError(
            f"Invalid {_SPARSE_SIZE} specified. Valid sizes are multiples of {SECTOR} up to "
            f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


COMMAND = Command(
    "[-f SRC_FMT | --image-opts] [-T SRC_CACHE] [-l SNAPSHOT] [-O TGT_FMT | --target-image-opts] "
    "[-o OPTIONS] [-t TGT_CACHE] [-n [--target-is-zero]] [-B BACKING [-F BACKING_FMT]] [-c] "
    "[-S SPARSE_SIZE] [-C] [--salvage] [-m COUNT] [-W] [-r RATE] [-p] [-q] [-U] "
    "[--object OBJDEF] SRC_FILENAME [SRC_FILENAME2 …] TGT_FILENAME",
    (
        HELP,
        QUIET,
        PROGRESS,
        Option("f", "source-format", "SRC_FMT", "format of the sources; else found by looking"),
        Option("", "source-image-opts", help="the sources are lists of options, not file names"),
        Option("", "image-opts", help="the same"),
        Option("l", "source-snapshot", "SNAPSHOT", "copy this internal snapshot of the source"),
        Option("T", "source-cache", "SRC_CACHE", "cache mode of the sources (writeback)"),
        Option("O", "target-format", "TGT_FMT", "format of the target (raw)"),
        Option("", "target-image-opts", help="the target is a list of options; needs -n"),
        OPTIONS._replace(long="target-options"),
        Option("c", "compress", help="compress the target"),
        Option("t", "target-cache", "TGT_CACHE", "cache mode of the target (unsafe)"),
        Option("B", "backing", "BACKING", "a backing file of the target, with what the source's "
               "holds: it is left out of the copy"),
        Option("F", "backing-format", "BACKING_FMT", "format of BACKING"),
        Option("n", "no-create", help="write into a target that is there already"),
        Option("", "target-is-zero", help="the target of -n reads as zeroes"),
        Option(
            "S",
            "sparse-size",
            "SPARSE_SIZE",
            "so many zeroes in a row are left out (4k); 0: allocate everything",
            _sparse_size,
        ),
        Option("", "bitmaps", help="copy persistent bitmaps as well"),
        Option("", "skip-broken-bitmaps", help="leave out bitmaps that are inconsistent"),
        FORCE_SHARE,
        Option("r", "rate", "RATE", "move at most so many bytes a second", number("rate limit")),
        Option(
            "m",
            "parallel",
            "COUNT",
            "threads, at most (8)",
            number("number of coroutines", 1, 16),
        ),
        Option("C", "copy-range-offloading", help="let the file system copy by itself"),
        Option("", "salvage", help="go on past what cannot be read; it becomes zeroes"),
        Option("W", "oob-writes", help="write in any order, which is quicker"),
        OBJECT,
    ),
    (
        ("SRC_FILENAME", "the source; several are put one behind the other"),
        ("TGT_FILENAME", "the target"),
    ),
)


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    if _show_options(given):
        return EXIT_OK
    _check(given)
    *source_names, target_name = given.operands

    from lamina.jobs.convert import convert
    from lamina.tools.progress import Progress

    with ExitStack() as stack, Progress(
        given.flag("progress"), quiet=given.flag("quiet")
    ) as progress:
        sources = [stack.enter_context(_open_source(tool, given, name)) for name in source_names]
        settings = _settings(given, tool)
        settings.progress = progress
        size = sum(source.size for source in sources)
        if given.flag("bitmaps"):
            _check_source_bitmaps(given, sources)
        if given.flag("no-create"):
            target = stack.enter_context(_open_target(tool, given, target_name))
            if target.size < size:
                raise UsageError("output file is smaller than input file")
        else:
            settings.target_is_zero = _create(tool, given, sources, size)
            target = stack.enter_context(_open_target(tool, given, target_name))
            if not settings.target_is_zero:
                settings.target_is_zero = _reads_zero(target)
        _settle_backing(given, settings, sources, target)
        if given.flag("bitmaps"):
            _check_target_bitmaps(target)
        convert(sources, target, settings)
        if given.flag("bitmaps"):
            _copy_bitmaps(sources[0], target, tool)
        target.flush()
    return EXIT_OK


def _show_options(given: Parsed) -> bool:
    from lamina.block.keyvalue import has_help

    if not given.flag("target-options") or not has_help(joined_options(given, "target-options")):
        return False
    from lamina.block.creation import options_help

    filename = given.operands[-1] if len(given.operands) > 1 else None
    text = options_help(given.value("target-format", "raw"), filename)
    sys.stdout.write(text + "\n")
    return True


def _check(given: Parsed) -> None:
    """What makes no sense whatever the images are. Raises UsageError."""
    no_create = given.flag("no-create")
    image_opts = given.flag("image-opts") or given.flag("source-image-opts")
    if given.flag("skip-broken-bitmaps") and not given.flag("bitmaps"):
        raise UsageError("Use of --skip-broken-bitmaps requires --bitmaps")
    if given.flag("target-format") and given.flag("target-image-opts"):
        raise UsageError("--image-opts and --format are mutually exclusive")
    if given.flag("source-format") and image_opts:
        raise UsageError("--image-opts and --format are mutually exclusive")
    if given.flag("target-image-opts") and not no_create:
        raise UsageError("--target-image-opts requires use of -n flag")
    if given.flag("copy-range-offloading"):
        if given.flag("salvage"):
            raise UsageError("Cannot use copy offloading in salvaging mode")
        if given.flag("compress"):
            raise UsageError("Cannot enable copy offloading when -c is used")
        if given.flag("sparse-size"):
            raise UsageError("Cannot enable copy offloading when -S is used")
    if given.flag("target-is-zero"):
        if not no_create:
            raise UsageError("--target-is-zero requires use of -n flag")
        if given.flag("backing"):
            raise UsageError(
                "Cannot use --target-is-zero when the destination image has a backing file"
            )
    if no_create and given.flag("target-options"):
        raise UsageError("-o has no effect when skipping image creation")
    if len(given.operands) < 2:
        raise UsageError("Must specify image file name")
    if given.flag("source-snapshot") and len(given.operands) > 2:
        raise UsageError("No support for concatenating multiple snapshot")
    check_cache_mode(given.value("source-cache", "writeback"), source=True)
    check_cache_mode(given.value("target-cache", "unsafe"))


def _settings(given: Parsed, tool: Tool) -> Settings:
    from lamina.jobs.convert import Settings

    copy_range = given.flag("copy-range-offloading")
    return Settings(
        sparse_size=given.value("sparse-size", 4096),
        compressed=given.flag("compress"),
        target_is_zero=given.flag("target-is-zero"),
        look_for_zeroes=not copy_range,
        copy_range=copy_range,
        workers=given.value("parallel", 8),
        any_order=given.flag("oob-writes"),
        rate=given.value("rate", 0),
        salvage=given.flag("salvage"),
        warn=lambda text: None if given.flag("quiet") else tool.warn(text),
    )


def _open_source(tool: Tool, given: Parsed, name: str) -> Backend:
    source = open_image(
        tool,
        name,
        format=given.value("source-format"),
        image_opts=given.flag("image-opts") or given.flag("source-image-opts"),
        cache=given.value("source-cache", "writeback"),
        force_share=given.flag("force-share"),
        # What is being copied must not change meanwhile.
        shared=Perm.ALL if given.flag("force-share") else Perm.CONSISTENT_READ,
    )
    if given.flag("source-snapshot"):
        try:
            load_snapshot(source, given.value("source-snapshot"))
        except LaminaError as error:
            source.close()
            raise error.in_context("Failed to load snapshot: ") from None
    return source


def _open_target(tool: Tool, given: Parsed, name: str) -> Backend:
    by_options = given.flag("target-image-opts")
    return open_image(
        tool,
        name,
        format=None if by_options else given.value("target-format", "raw"),
        image_opts=by_options,
        writable=True,
        cache=given.value("target-cache", "unsafe"),
        discard="unmap",
        options={} if by_options else _secrets(given),
    )


def _secrets(given: Parsed) -> dict[str, str]:
    """Of the creation options, those that opening what was created takes as well."""
    from lamina.block.keyvalue import parse_keyvalue

    options = parse_keyvalue(joined_options(given, "target-options"))
    return {key: value for key, value in options.items() if key.endswith("key-secret")}


# -- creating the target ---------------------------------------------------------------------------


def _create(tool: Tool, given: Parsed, sources: list[Backend], size: int) -> bool:
    """Create it; True if it is known to read as zeroes then."""
    from lamina.block import registry
    from lamina.block.creation import BACKING_FILE, BACKING_FORMAT, SIZE, prepare
    from lamina.block.filenames import protocol_name
    from lamina.block.keyvalue import parse_keyvalue

    filename = given.operands[-1]
    format = given.value("target-format", "raw")
    options = parse_keyvalue(joined_options(given, "target-options"))
    # The sources say how large it has to be.
    options.pop(SIZE, None)
    if not registry.is_known(format):
        raise UsageError(f"Unknown file format '{format}'")
    driver = registry.driver(format)
    backing = given.value("backing", options.get(BACKING_FILE))
    _check_support(given, driver, options)
    if backing is not None and not driver.supports_backing:
        raise UsageError(f"Backing file not supported for file format '{format}'")
    if backing is not None and len(sources) > 1:
        raise UsageError(
            "Having a backing file for the target makes no sense when concatenating multiple "
            "input images"
        )
    if backing is not None and not given.value("backing-format", options.get(BACKING_FORMAT)):
        raise UsageError("Use of backing file requires explicit backing format")
    creation = prepare(
        filename,
        format,
        session=tool.session,
        options=options,
        size=size,
        backing_file=given.value("backing"),
        backing_format=given.value("backing-format"),
        open_backing=False,
    )
    try:
        creation.run()
    except LaminaError as error:
        raise error.in_context(f"{filename}: error while converting {format}: ") from None
    if backing is not None or _secrets(given):
        # What an encrypted image holds where nothing was written depends on its allocation.
        return False
    return registry.driver(protocol_name(filename)).creates_zeroes


def _check_support(given: Parsed, driver: Driver, options: dict[str, str]) -> None:
    if not given.flag("compress"):
        return
    if not driver.supports_compression:
        raise UsageError("Compression not supported for this file format")
    if options.get("encryption") in ("on", "yes", "true", "y") or "encrypt.format" in options:
        raise UsageError("Compression and encryption not supported at the same time")
    if options.get("preallocation", "off") != "off":
        raise UsageError("Compression and preallocation not supported at the same time")


# -- bitmaps ---------------------------------------------------------------------------------------


def _check_source_bitmaps(given: Parsed, sources: list[Backend]) -> None:
    """Raises UsageError, ImageCorrupt."""
    from lamina.block import registry
    from lamina.jobs.bitmaps import check_copyable

    if len(sources) > 1:
        raise UsageError("Copying bitmaps only possible with single source")
    source = sources[0].node.unfiltered
    if not registry.driver(source.driver).keeps_bitmaps(source):
        raise UsageError("Source lacks bitmap support")
    check_copyable(source, skip_broken=given.flag("skip-broken-bitmaps"))


def _check_target_bitmaps(target: Backend) -> None:
    from lamina.block import registry

    driver = registry.driver(target.node.unfiltered.driver)
    if not driver.keeps_bitmaps(target.node.unfiltered):
        raise UsageError(f"Format driver '{driver.name}' does not support bitmaps")


def _copy_bitmaps(source: Backend, target: Backend, tool: Tool) -> None:
    from lamina.jobs.bitmaps import copy_bitmaps
    from lamina.tools.bitmaps import fail_to_close, store_bitmaps

    copy_bitmaps(source.node.unfiltered, target.node.unfiltered, warn=tool.warn)
    if not store_bitmaps(target.node.unfiltered, tool):
        fail_to_close(tool)


# -- the target's content --------------------------------------------------------------------------


def _settle_backing(
    given: Parsed, settings: Settings, sources: list[Backend], target: Backend
) -> None:
    """A backing file that was asked for is taken to hold what that of the source does."""
    backing = target.node.unfiltered.backing
    created = not given.flag("no-create")
    if given.flag("backing") or (created and backing is not None):
        settings.base = sources[0].node.unfiltered.backing
    if created and backing is not None:
        settings.zero_from = backing.size


def _reads_zero(target: Backend) -> bool:
    """Whether a new image, made on storage that held something, shows zeroes only."""
    from lamina.jobs.sources import Sources

    return all(status.reads_zero for status in Sources([target]).statuses())
