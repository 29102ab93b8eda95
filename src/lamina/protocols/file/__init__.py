"""Regular files of the host: the protocol underneath nearly every image."""

from __future__ import annotations

from lamina.block.driver import Driver
from lamina.block.filenames import plain_file
from lamina.block.options import Type, option
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node

PREFIX = "file:"


@dataclass(frozen=True)
class FileOptions:
    """QEMU's. Those that decide nothing here (how requests are queued, what live migration does)
    are accepted all the same."""

    filename: str = option("filename", Type.STRING, "", "File name of the image")
    locking: str = option(
        "locking", Type.STRING, "auto", "File locking mode (on/off/auto, default: auto)"
    )
    aio: str = option(
        "aio", Type.STRING, "threads", "host AIO implementation (threads, native, io_uring)"
    )
    aio_max_batch: int = option(
        "aio-max-batch", Type.NUMBER, 0, "AIO max batch size (0 = auto handled by AIO backend)"
    )
    pr_manager: str | None = option(
        "pr-manager", Type.STRING, None, "id of persistent reservation manager object"
    )
    drop_cache: bool = option(
        "drop-cache", Type.BOOL, True, "invalidate page cache during live migration"
    )
    x_check_cache_dropped: bool = option(
        "x-check-cache-dropped", Type.BOOL, False, "check that page cache was dropped"
    )


@dataclass(frozen=True)
class FileCreateOptions:
    size: int = option("size", Type.SIZE, 0, "Virtual disk size")
    nocow: bool = option("nocow", Type.BOOL, False, "Turn off copy-on-write (valid only on btrfs)")
    preallocation: str = option(
        "preallocation",
        Type.STRING,
        "off",
        "Preallocation mode (allowed values: off, falloc, full)",
    )
    extent_size_hint: int | None = option(
        "extent_size_hint",
        Type.SIZE,
        None,
        "Extent size hint for the image file, 0 to disable",
    )


class FileDriver(Driver):
    name = "file"
    Options = FileOptions
    CreateOptions = FileCreateOptions
    creates_zeroes = True

    def parse_filename(self, filename: str) -> dict[str, Any]:
        return {"filename": plain_file(filename)}

    def open(self, options: FileOptions, context: OpenContext) -> Node:
        """Raises UsageError for what is no regular file, StorageError where the host refuses."""
        from lamina.protocols.file.opening import open_file

        check_options(self.name, options, direct=context.node_options.direct)
        return open_file(options, context.node_options)

    def create_file(
        self, filename: str, options: FileCreateOptions, context: CreateContext
    ) -> None:
        from lamina.protocols.file.create import create_file

        create_file(filename.removeprefix(PREFIX), options, context.warn)


def check_options(driver: str, options: FileOptions, *, direct: bool) -> None:
    """What can be said against the options before the file is touched. Raises UsageError."""
    if not options.filename:
        raise UsageError(f"The '{driver}' block driver requires a file name")
    for value, choices in (
        (options.locking, ("auto", "on", "off")),
        (options.aio, ("threads", "native", "io_uring")),
    ):
        if value not in choices:
            raise UsageError(f"invalid parameter value: {value}")
    if options.pr_manager is not None:
        raise UsageError(f"No persistent reservation manager with id '{options.pr_manager}'")
    if options.aio == "native" and not direct:
        raise UsageError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )


DRIVER = FileDriver()
