"""``map``: where the data of an image is, for people and for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lamina.errors import UsageError
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    MAX_SIZE,
    OBJECT,
    OUTPUT,
    Option,
    WrongUsage,
    number,
)
from lamina.tools.img.command import Command
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.jobs.map import Fate, Rows

COMMAND = Command(
    "[-f FMT | --image-opts] [--start-offset OFFSET] [--max-length LENGTH] [-U] "
    "[--object OBJDEF] [--output human|json] FILENAME",
    (
        HELP,
        FORMAT,
        IMAGE_OPTS,
        Option(
            "s",
            "start-offset",
            "OFFSET",
            "byte of the disk to begin at (0)",
            number("start offset"),
        ),
        Option(
            "l",
            "max-length",
            "LENGTH",
            "bytes to look at, at most",
            number("max length"),
        ),
        FORCE_SHARE,
        OBJECT,
        OUTPUT,
    ),
    (("FILENAME", "the image"),),
)

_HEADER = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    if len(given.operands) != 1:
        raise WrongUsage("Expecting one image file name")
    check_format_options(given)
    as_json = given.value("output", False)
    with open_given(tool, given, given.operands[0]) as image:
        if not as_json:
            sys.stdout.write(_HEADER)
        start = given.value("start-offset", 0)
        length = min(given.value("max-length", MAX_SIZE), image.size - start)
        blocks: Iterator[Rows] = iter(())
        if length > 0:
            from lamina.jobs.map import map_rows

            blocks = map_rows(image.node, start, length)
        for text in _json_texts(blocks, start) if as_json else _human_texts(blocks):
            sys.stdout.write(text)
    return EXIT_OK


def _human_texts(blocks: Iterator[Rows]) -> Iterator[str]:
    """Of runs that hold data only. Raises UsageError for data that is nowhere plainly."""
    for rows in blocks:
        shown = [fate.data and not fate.zero for fate in rows.fates]
        names = [fate.file.filename if fate.file else None for fate in rows.fates]
        lines: list[str] = []
        for start, length, fate, offset in zip(*rows[:4], strict=True):
            if not shown[fate]:
                continue
            name = names[fate]
            if name is None:
                yield "".join(lines)
                raise UsageError("File contains external, encrypted or compressed clusters.")
            lines.append(
                f"{hex(start) if start else '0':<16}{hex(length):<16}"
                f"{hex(offset) if offset else '0':<16}{name}\n"
            )
        yield "".join(lines)


def _json_texts(blocks: Iterator[Rows], start: int) -> Iterator[str]:
    """Blocks of lines; a range without any byte has one line all the same."""
    separator = "["
    for rows in blocks:
        fates = [_json_fate(fate) for fate in rows.fates]
        lines = [
            f'{{ "start": {start}, "length": {length}, {fates[fate]}, "offset": {offset}}}'
            if offset >= 0
            else f'{{ "start": {start}, "length": {length}, {fates[fate]}}}'
            for start, length, fate, offset in zip(*rows[:4], strict=True)
        ]
        yield separator + ",\n".join(lines)
        separator = ",\n"
    if separator == "[":
        yield (
            f'[{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, '
            f'"data": false, "compressed": false}}'
        )
    yield "]\n"


def _json_fate(fate: Fate) -> str:
    def word(flag: bool) -> str:
        return "true" if flag else "false"

    return (
        f'"depth": {fate.depth}, "present": {word(fate.present)}, "zero": {word(fate.zero)}, '
        f'"data": {word(fate.data)}, "compressed": {word(fate.compressed)}'
    )
