"""What the tool says about itself: its usage, its version, the help of its commands."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from lamina.hints import TYPE_CHECKING
from lamina.tools.io.commands import COMMANDS, CommandFailed, find

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell
    from lamina.tools.tool import Tool

_COLUMN = 23

_OPTIONS = {
    "-a": "refused, as ever",
    "-b": "the VM state kept in the image rather than the disk",
    "-c": "compress what is written",
    "-C": "report in figures for programs: bytes,operations,time,bytes/s,operations/s",
    "-f": "durable when the command is done (Force Unit Access)",
    "-i": "count a request that was invalid, without making one",
    "-n": "with -z: fail rather than write zeroes one by one",
    "-p": "ignored",
    "-P": "the byte that the buffer is filled with, or that is expected (0 to 255)",
    "-q": "report nothing",
    "-r": "register the buffer with the host first; makes no difference here",
    "-u": "with -z: space may be given back to the host",
    "-v": "show the bytes in hexadecimal",
    "-z": "zeroes, told rather than written where possible",
}
"""What most options mean wherever they occur."""

_READING = """
Shows how many bytes were read, and how quickly. With a pattern, bytes that differ from it
make the command fail.
"""
_WRITING = """
Fills a buffer with the byte 0xcd, or what the options ask for, and writes it.
"""
_LATER = """
The command ends as soon as the request is on its way, and has then succeeded, whatever
becomes of the request. The report follows when the request is done; aio_flush waits for
all of them.
"""

_LONG: dict[str, tuple[str, str, dict[str, str]]] = {
    "aio_read": (_LATER, "aio_read -P 5 64k 4k", {}),
    "aio_write": (_LATER, "aio_write -P 5 64k 4k 4k", {}),
    "discard": (
        "\nWhether anything becomes of it depends on the image, and on how it was opened (-d).\n",
        "discard 1M 64k",
        {},
    ),
    "open": (
        "\nThe path may be left out where the options say what to open.\n",
        "open -o driver=raw,offset=1M disk.img",
        {
            "-r": "for reading only",
            "-s": "write to a temporary file, and forget it at the end",
            "-C": "keep a copy of what is read from a backing file",
            "-n": "keep out of the host's page cache, as -t none",
            "-U": "read although others may be writing to the image",
            "-k": "the same as -i native",
            "-i": "how requests reach the host: threads, native or io_uring",
            "-t": "none, writeback, writethrough, directsync or unsafe",
            "-d": "whether discards reach the storage: unmap or ignore",
            "-o": "options of the driver, KEY=VALUE,…",
        },
    ),
    "read": (
        _READING,
        "read -P 0xcd 64k 4k",
        {"-l": "with -P: how many bytes are compared", "-s": "with -P: from which byte on"},
    ),
    "readv": (_READING, "readv -v 512 1k 1k", {}),
    "reopen": (
        "\nWhat is not mentioned stays as it is.\n",
        "reopen -r",
        {
            "-r": "from now on for reading only",
            "-w": "from now on for reading and writing",
            "-c": "with another cache mode",
            "-o": "with other options of the driver, KEY=VALUE,…",
        },
    ),
    "sigraise": ("\nWhat happens then is up to the signal.\n", "sigraise 15", {}),
    "write": (
        _WRITING,
        "write -P 5 64k 4k",
        {"-s": "a file whose content is written, again and again if it is too short"},
    ),
    "writev": (_WRITING, "writev -P 5 64k 4k 4k", {}),
}


def run_help(shell: Shell, arguments: Sequence[str]) -> None:
    if not arguments:
        lines = [command.line(name) for name, command in sorted(COMMANDS.items())]
        shell.say("\n".join([*lines, "", "Use 'help commandname' for extended help.", ""]))
        return
    name = arguments[0]
    found = find(name)
    if found is None:
        raise CommandFailed(f"command {name} not found")
    full, command = found
    text = command.line(name) + "\n"
    if full in _LONG:
        text += _details(full, command.synopsis)
    shell.say(text)


def _details(name: str, synopsis: str) -> str:
    explanation, example, options = _LONG[name]
    lines = [*explanation.splitlines(), "", "Example:", f"'{example}'", ""]
    for letter in synopsis.replace("|", " ").replace("[", " ").replace("(", " ").split():
        if not letter.startswith("-"):
            continue
        for one in letter.rstrip("])")[1:]:
            meaning = options.get(f"-{one}") or _OPTIONS[f"-{one}"]
            lines.append(f"-{one}, -- {meaning}")
    return "".join(f" {line}".rstrip() + "\n" for line in lines)


def usage(tool: Tool) -> None:
    from lamina.tools.io.start import OPTIONS

    lines = [
        f"Usage: {tool.name} [OPTIONS]... [-c STRING]... [file]",
        "Read, write and disturb disk images by hand or script",
        "",
    ]
    for option in OPTIONS:
        names = f"-{option.short}, --{option.long}" if option.short else f"--{option.long}"
        names = f"  {names} {option.argument}".rstrip()
        lines += textwrap.wrap(
            option.help,
            79,
            initial_indent=names.ljust(_COLUMN),
            subsequent_indent=" " * _COLUMN,
        )
    lines += ["", f"See '{tool.name} -c help' for information on available commands.", ""]
    sys.stdout.write("\n".join(lines))


def version(tool: Tool) -> None:
    from lamina.tools.version import version_line

    sys.stdout.write(version_line(tool) + "\n")
