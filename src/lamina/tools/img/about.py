"""``--version`` and ``--help`` of the tool as a whole, and the help of its subcommands."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from lamina.tools.arguments import Option
from lamina.tools.tool import EXIT_OK, Tool
from lamina.tools.version import version_line


def show(tool: Tool, help_wanted: bool) -> int:
    lines = [version_line(tool)]
    if help_wanted:
        from lamina.block import registry
        from lamina.tools.img import _OPTIONS, COMMANDS

        formats = textwrap.fill(
            " ".join(registry.names()), 78, initial_indent="  ", subsequent_indent="  "
        )
        lines += [
            "Work with disk images.  Usage:",
            "",
            f"  {tool.name} [standard options] COMMAND [--help | command options]",
            "",
            "Standard options:",
            *_option_lines(_OPTIONS),
            "",
            f"Recognized commands ({tool.name} COMMAND --help tells more about one):",
            "",
            *(f"  {name} - {purpose}" for name, purpose in COMMANDS.items()),
            "",
            "Supported image formats:",
            "",
            formats,
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def show_command(
    tool: Tool, usage: str, options: Sequence[Option], operands: Sequence[tuple[str, str]]
) -> int:
    """The help of a subcommand: ``usage`` is what follows its name, ``operands`` what is no option
    with an explanation each."""
    from lamina.tools.img import COMMANDS

    purpose = COMMANDS[tool.command]
    synopsis = textwrap.fill(
        f"  {tool.full_name} {usage}", 78, subsequent_indent=" " * 8, break_on_hyphens=False
    )
    lines = [
        "Usage:",
        f"{purpose[0].upper()}{purpose[1:]}.  Usage:",
        "",
        synopsis,
        "",
        "Arguments:",
        *_option_lines(options),
        *(line for name, text in operands for line in _entry(name, text)),
        "",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def _option_lines(options: Sequence[Option]) -> list[str]:
    lines = []
    for option in options:
        names = [f"-{option.short}"] if option.short else []
        names += [f"--{option.long}"] if option.long else []
        lines += _entry(" ".join([", ".join(names), *filter(None, [option.argument])]), option.help)
    return lines


def _entry(name: str, text: str) -> list[str]:
    margin = " " * 5
    return [f"  {name}", *textwrap.wrap(text, 72, initial_indent=margin, subsequent_indent=margin)]
