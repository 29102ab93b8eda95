"""``snapshot``: list, make, apply and delete the internal snapshots of an image."""

from __future__ import annotations

import sys
import time

from lamina.errors import LaminaError
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    Option,
    WrongUsage,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_format_options, open_given
from lamina.tools.tool import EXIT_OK, Tool

COMMAND = Command(
    "[-f FMT | --image-opts] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] [-U] "
    "[--object OBJDEF] [-q] FILENAME",
    (
        HELP,
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        FORCE_SHARE,
        OBJECT,
        Option("l", "list", help="list the snapshots (what is done if nothing is said)"),
        Option("c", "create", "SNAPSHOT", "make one of this name"),
        Option("a", "apply", "SNAPSHOT", "make the disk what it was then"),
        Option("d", "delete", "SNAPSHOT", "delete it"),
    ),
    (("FILENAME", "the image"),),
)

_ACTIONS = ("list", "create", "apply", "delete")


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    chosen = [(key, value) for key, value in given.given if key in _ACTIONS]
    if len(chosen) > 1:
        raise WrongUsage("Cannot mix '-l', '-a', '-c', '-d'")
    filename = image_name(given)
    check_format_options(given)
    action, name = chosen[0] if chosen else ("list", "")
    changes = action != "list"
    with open_given(tool, given, filename, writable=changes) as image:
        from lamina.block import registry

        layer = image.node.unfiltered
        driver = registry.driver(layer.driver)
        if action == "list":
            from lamina.tools.img import snapshot_table

            snapshots = layer.info().snapshots
            if snapshots:
                lines = ["Snapshot list:", *snapshot_table.lines(snapshots)]
                sys.stdout.write("\n".join(lines) + "\n")
            return EXIT_OK
        try:
            if action == "create":
                from lamina.block.info import SnapshotInfo

                now, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
                driver.create_snapshot(layer, SnapshotInfo("", name, 0, now, nanoseconds, 0, 0, 0))
            elif action == "apply":
                driver.apply_snapshot(layer, name)
            else:
                driver.delete_snapshot(layer, name)
        except LaminaError as error:
            raise error.in_context(f"Could not {action} snapshot '{name}': ") from None
    return EXIT_OK
