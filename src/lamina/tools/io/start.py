"""The command line of the tool, and what it makes of it."""

from __future__ import annotations

import sys

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.tools.arguments import GetoptError, Option, Parsed, parse
from lamina.tools.io.shell import Shell
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from lamina.tools.io.files import How
    from lamina.tools.tool import Tool

OPTIONS = (
    Option("", "object", "OBJDEF", "an object that the image needs, as TYPE,id=ID,…"),
    Option("", "image-opts", help="FILE is a list of options (driver=…,…) instead of a file name"),
    Option("c", "cmd", "STRING", "a command to execute; may be given several times"),
    Option("f", "format", "FMT", "format of the image; found out by looking if not given"),
    Option("r", "read-only", help="open for reading only"),
    Option("s", "snapshot", help="write to a temporary file, and forget it at the end"),
    Option("n", "nocache", help="keep out of the host's page cache, as -t none"),
    Option("C", "copy-on-read", help="keep a copy of what is read from a backing file"),
    Option("m", "misalign", help="use buffers at odd addresses in memory"),
    Option("k", "native-aio", help="the same as -i native"),
    Option("i", "aio", "MODE", "how requests reach the host: threads, native or io_uring"),
    Option("t", "cache", "MODE", "none, writeback, writethrough, directsync or unsafe"),
    Option("d", "discard", "MODE", "whether discards reach the storage: unmap or ignore"),
    Option("T", "trace", "TRACE", "accepted as QEMU's tools do; there is nothing to trace"),
    Option("U", "force-share", help="read although others may be writing to the image"),
    Option("h", "help", help="show this help and exit"),
    Option("V", "version", help="show the version and exit"),
)


def run(arguments: list[str], tool: Tool) -> int:
    _prepare_streams()
    try:
        given = parse(arguments, OPTIONS, stop_at=("help", "version"))
    except GetoptError as error:
        tool.error(error)
        return _usage(tool, EXIT_FAILURE)
    if given.flag("help"):
        return _usage(tool, EXIT_OK)
    if given.flag("version"):
        from lamina.tools.io.manual import version

        version(tool)
        return EXIT_OK
    how = _how(given)
    if len(given.operands) > 1:
        return _usage(tool, EXIT_FAILURE)
    if how.image_opts and given.flag("format"):
        raise UsageError("--image-opts and -f are mutually exclusive")
    for text in given.values("object"):
        from lamina.tools.objects import add_object

        add_object(tool, text)
    shell = Shell(tool, misalign=given.flag("misalign"))
    if given.operands:
        from lamina.tools.io import files

        files.open_image(shell, given.operands[0], how)
    try:
        if given.flag("cmd"):
            shell.run_commands(given.values("cmd"))
        else:
            shell.converse(sys.stdin)
    finally:
        shell.close()
    return EXIT_FAILURE if shell.failed else EXIT_OK


def _prepare_streams() -> None:
    if hasattr(sys.stdin, "reconfigure"):
        # File names are bytes: those that are no text pass through unharmed.
        sys.stdin.reconfigure(errors="surrogateescape")
    if hasattr(sys.stdout, "reconfigure"):
        # Like C's: in blocks unless somebody watches, and messages of errors overtake it.
        sys.stdout.reconfigure(write_through=False, line_buffering=sys.stdout.isatty())


def _how(given: Parsed) -> How:
    """Raises UsageError for words that are no modes."""
    from lamina.tools.io.files import how_to_open

    letters = {option.key: option.short for option in OPTIONS}
    how = how_to_open([(letters[key], value) for key, value in given.given])
    return replace(how, format=given.value("format"), image_opts=given.flag("image-opts"))


def _usage(tool: Tool, code: int) -> int:
    from lamina.tools.io.manual import usage

    usage(tool)
    return code

