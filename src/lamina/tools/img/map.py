"""``map``: where the data of an image is, for people and for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.jobs.map import Fate, map_rows
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    MAX_SIZE,
    OBJECT,
    OUTPUT,
    Option,
    number,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.jobs.map import Rows

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
    filename = image_name(given)
    check_format_options(given)
    as_json = given.value("output", False)
    with open_given(tool, given, filename) as image:
        if not as_json:
            sys.stdout.write(_HEADER)
        start = given.value("start-offset", 0)
        length = min(given.value("max-length", MAX_SIZE), image.size - start)
        blocks: Iterator[Rows] = iter(())
        if length > 0:
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
        for start, length, fate, offset in zip(*rows.as_lists(), strict=True):
            if not shown[fate]:
                continue
            name = names[fate]
            if name is None:
                yield "".join(lines)
                raise UsageError("File contains external, encrypted or compressed clusters.")
            lines.append(f"{_hex(start):<16}{_hex(length):<16}{_hex(offset):<16}{name}\n")
        yield "".join(lines)


def _hex(number: int) -> str:
    return hex(number) if number else "0"


def _json_texts(blocks: Iterator[Rows], start: int) -> Iterator[str]:
    """Blocks of lines; a range without any byte has one line all the same."""
    opening = "["
    for rows in blocks:
        fates = [_json_fate(fate) for fate in rows.fates]
        text = _json_lines(rows, fates) if isinstance(rows.start, list) else _bulk(rows, fates)
        yield opening + text.removeprefix(",\n")
        opening = ",\n"
    if opening == "[":
        nothing = Fate(0, present=False, zero=False, data=False, compressed=False, file=None)
        yield f'[{{ "start": {start}, "length": 0{_json_fate(nothing)}}}'
    yield "]\n"


def _json_lines(rows: Rows, fates: list[str]) -> str:
    return "".join(
        f',\n{{ "start": {start}, "length": {length}{fates[fate]}'
        f"{offset if offset >= 0 else ''}}}"
        for start, length, fate, offset in zip(*rows.as_lists(), strict=True)
    )


def _bulk(rows: Rows, fates: list[str]) -> str:
    """The same for arrays: millions of lines take a third of the time."""
    import numpy as np

    from lamina.tools.bulk import decimal, lines, words

    start, length, fate, offset = map(np.asarray, rows[:4])
    return lines(
        (
            ',\n{ "start": ',
            decimal(start),
            ', "length": ',
            decimal(length),
            words(fates, fate),
            decimal(offset),
            "}",
        )
    )


def _json_fate(fate: Fate) -> str:
    """What follows the length, up to the figure of the offset."""
    flags = {
        "present": fate.present,
        "zero": fate.zero,
        "data": fate.data,
        "compressed": fate.compressed,
    }
    text = f', "depth": {fate.depth}'
    for name, is_set in flags.items():
        text += f', "{name}": {"true" if is_set else "false"}'
    return text + (', "offset": ' if fate.file else "")
