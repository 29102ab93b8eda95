"""``lamina-img``: create, inspect, convert and change disk images. Drop-in for ``qemu-img``.

A module per subcommand, imported when it is called: ``run(arguments, tool)`` gives the exit code.
"""

from __future__ import annotations

from lamina.hints import NoReturn
from lamina.tools.arguments import HELP, Option, WrongUsage, parse
from lamina.tools.tool import EXIT_OK, Tool, run_and_leave

COMMANDS = {
    "amend": "change options of the format of an existing image",
    "bench": "measure how fast an image answers",
    "bitmap": "change the dirty bitmaps kept in an image",
    "check": "look for errors and leaks in an image, and repair them",
    "commit": "write the content of an image into its backing file",
    "compare": "tell whether two images hold the same",
    "convert": "copy images into a new one, maybe of another format",
    "create": "make a new, empty image",
    "dd": "copy a part of an image into a new one",
    "info": "show what is known about an image",
    "map": "show where the data of an image is",
    "measure": "tell how large a new image would be",
    "rebase": "give an image another backing file",
    "resize": "make an image larger or smaller",
    "snapshot": "list, make, apply and delete internal snapshots",
}

_OPTIONS = (
    HELP,
    Option("V", "version", help="show the version and exit"),
    Option("T", "trace", "TRACE", "accepted as QEMU's tools do; there is nothing to trace"),
)


def main() -> NoReturn:
    run_and_leave(run)


def run(arguments: list[str], tool: Tool) -> int:
    given = parse(arguments, _OPTIONS, permute=False, stop_at=("help", "version"))
    if given.flag("help") or given.flag("version"):
        from lamina.tools.img import about

        return about.show(tool, given.flag("help"))
    if not given.operands:
        raise WrongUsage("Not enough arguments")
    command, *rest = given.operands
    if command not in COMMANDS:
        raise WrongUsage(f"Command not found: {command}")
    tool.command = command
    module = __import__(f"lamina.tools.img.{command}", fromlist=["run"])
    code: int = module.run(rest, tool)
    return code if code else EXIT_OK
