"""``dd``: copy a part of an image into a new one."""

from __future__ import annotations

from collections.abc import Callable

from lamina.errors import LaminaError, UsageError
from lamina.tools.arguments import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, Option, number
from lamina.tools.img.command import Command
from lamina.tools.opening import check_format_options, open_given, open_image
from lamina.tools.tool import EXIT_OK, Tool
from lamina.units import SECTOR, round_up

_MAX_BLOCK = (1 << 31) - 1

COMMAND = Command(
    "[-f FMT | --image-opts] [-O OUTPUT_FMT] [-U] [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] "
    "if=INPUT of=OUTPUT",
    (
        HELP,
        FORMAT,
        IMAGE_OPTS,
        Option("O", "output-format", "OUTPUT_FMT", "format of OUTPUT (raw)"),
        FORCE_SHARE,
        OBJECT,
    ),
    (
        ("bs=BLOCK_SIZE", "bytes in a block (512)"),
        ("count=BLOCKS", "how many blocks to copy (all)"),
        ("skip=BLOCKS", "how many blocks of INPUT to leave out at its beginning (0)"),
        ("if=INPUT", "the image to copy from"),
        ("of=OUTPUT", "the image to create"),
    ),
)
_OPERANDS: dict[str, Callable[[str], int | str]] = {
    "bs": number("bs", 1, _MAX_BLOCK),
    "count": number("count"),
    "skip": number("skip"),
    "if": str,
    "of": str,
}


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    words: dict[str, int | str] = {}
    for operand in given.operands:
        key, equals, text = operand.partition("=")
        if not equals or key not in _OPERANDS:
            raise UsageError(f"unrecognized operand {key}")
        words[key] = _OPERANDS[key](text)
    if "if" not in words or "of" not in words:
        raise UsageError("Must specify both input and output files")
    source_name, target_name = str(words["if"]), str(words["of"])
    block, count, skip = (words.get(key) for key in ("bs", "count", "skip"))
    block = block if isinstance(block, int) else SECTOR
    skip = skip if isinstance(skip, int) else 0
    format = given.value("output-format", "raw")
    check_format_options(given)

    from lamina.block import registry
    from lamina.block.creation import prepare
    from lamina.jobs.dd import copy_window

    with open_given(tool, given, source_name) as source:
        if not registry.is_known(format):
            raise UsageError("Unknown file format")
        end = source.size
        if isinstance(count, int):
            # As QEMU counts: from the beginning of INPUT, what is skipped included.
            end = min(end, count * block)
        start = skip * block
        length = max(end - start, 0)
        creation = prepare(
            target_name, format, session=tool.session, size=round_up(length, SECTOR)
        )
        try:
            creation.run()
        except LaminaError as error:
            raise error.in_context(
                f"{target_name}: error while creating output image: "
            ) from None
        if start > end:
            tool.error(f"{source_name}: cannot skip to specified offset")
            return EXIT_OK
        with open_image(tool, target_name, format=format, writable=True, cache="unsafe") as target:
            copy_window(source, start, length, target)
            target.flush()
    return EXIT_OK
