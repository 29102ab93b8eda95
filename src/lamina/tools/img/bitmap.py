"""``bitmap``: change the dirty bitmaps kept in an image."""

from __future__ import annotations

from contextlib import ExitStack

from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.tools.arguments import FORMAT, HELP, IMAGE_OPTS, OBJECT, Option, number
from lamina.tools.bitmaps import fail_to_close, store_bitmaps
from lamina.tools.img.command import Command
from lamina.tools.opening import check_format_options, open_given, open_image
from lamina.tools.tool import EXIT_OK, Tool

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.node import Node

COMMAND = Command(
    "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)… [-b SRC_FILENAME "
    "[-F SRC_FMT]] [-g SIZE] [-f FMT | --image-opts] [--object OBJDEF] FILENAME BITMAP",
    (
        HELP,
        FORMAT,
        IMAGE_OPTS,
        Option("", "add", help="make BITMAP, and have it record"),
        Option(
            "g",
            "granularity",
            "SIZE",
            "bytes of the disk for one bit of the new bitmap",
            number("granularity"),
        ),
        Option("", "remove", help="delete BITMAP"),
        Option("", "clear", help="forget what BITMAP has recorded"),
        Option("", "enable", help="have BITMAP record"),
        Option("", "disable", help="have BITMAP record no more"),
        Option("", "merge", "SOURCE", "add to BITMAP what the bitmap SOURCE says"),
        Option("b", "source-file", "SRC_FILENAME", "the image that SOURCE is in (FILENAME)"),
        Option("F", "source-format", "SRC_FMT", "its format"),
        OBJECT,
    ),
    (
        ("FILENAME", "the image"),
        ("BITMAP", "the bitmap; all that is asked for happens to it, in the order asked for"),
    ),
)

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    actions = [(key, value) for key, value in given.given if key in _ACTIONS]
    if not actions:
        names = ", ".join(f"--{action}" for action in _ACTIONS[:-1])
        raise UsageError(f"Need at least one of {names}, or --merge")
    if given.flag("granularity") and not given.flag("add"):
        raise UsageError("granularity only supported with --add")
    if given.flag("source-format") and not given.flag("source-file"):
        raise UsageError("-F only supported with -b")
    if given.flag("source-file") and not given.flag("merge"):
        raise UsageError("Merge bitmap source file only supported with --merge")
    if len(given.operands) != 2:
        raise UsageError("Expecting filename and bitmap name")
    check_format_options(given)
    filename, name = given.operands
    with ExitStack() as stack:
        image = stack.enter_context(
            open_given(tool, given, filename, writable=True, backing=False)
        )
        layer = image.node.unfiltered
        source = layer
        if given.flag("source-file"):
            source = stack.enter_context(
                open_image(
                    tool,
                    given.value("source-file"),
                    format=given.value("source-format"),
                    backing=False,
                )
            ).node.unfiltered
        from lamina.block import registry

        driver = registry.driver(layer.driver)
        granularity = given.value("granularity") or None
        for action, argument in actions:
            try:
                _do(driver, layer, name, action, granularity, source, argument)
            except LaminaError as error:
                prefix = f"Operation {action} on bitmap {name} failed: "
                raise error.in_context(prefix) from None
        if not store_bitmaps(layer, tool):
            fail_to_close(tool)
    return EXIT_OK


def _do(
    driver: Driver,
    layer: Node,
    name: str,
    action: str,
    granularity: int | None,
    source: Node,
    source_name: str,
) -> None:
    if action == "add":
        driver.add_bitmap(layer, name, granularity)
    elif action == "remove":
        driver.remove_bitmap(layer, name)
    elif action == "clear":
        driver.clear_bitmap(layer, name)
    elif action == "merge":
        driver.merge_bitmap(layer, name, source, source_name)
    else:
        driver.enable_bitmap(layer, name, action == "enable")
