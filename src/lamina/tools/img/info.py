"""``info``: what is known about an image and, if asked, about the images below it.

Nothing that an image names is opened without ``--backing-chain``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.arguments import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    Option,
    Parsed,
)
from lamina.tools.img.command import Command, image_name
from lamina.tools.opening import check_format_options, open_image
from lamina.tools.output import to_json, tree_lines
from lamina.tools.tool import EXIT_OK, Tool
from lamina.units import size_to_str

if TYPE_CHECKING:
    from lamina.block.info import NodeInfo
    from lamina.block.node import Node

COMMAND = Command(
    "[-f FMT | --image-opts] [-b] [-U] [--object OBJDEF] [--output human|json] FILENAME",
    (
        HELP,
        FORMAT,
        IMAGE_OPTS,
        Option("b", "backing-chain", help="show the backing files as well, one after the other"),
        FORCE_SHARE,
        OBJECT,
        OUTPUT,
    ),
    (("FILENAME", "the image"),),
)


class Described:
    """What a node says of itself, and its children under their roles."""

    def __init__(self, node: Node) -> None:
        self.info = node.info()
        self.is_protocol = not node.is_format and not node.is_filter
        self.children = [
            (role, Described(attachment.node))
            # The latest one first.
            for role, attachment in reversed(node.children.items())
            if role != "backing"
        ]


def run(arguments: list[str], tool: Tool) -> int:
    given = COMMAND.parse(arguments, tool)
    filename = image_name(given)
    check_format_options(given)
    whole_chain = given.flag("backing-chain")
    images = list(_images(tool, given, filename, whole_chain))
    if given.value("output", False):
        values = [json_value(image) for image in images]
        text = to_json(values if whole_chain else values[0])
    else:
        text = "\n\n".join("\n".join(human_lines(image)) for image in images)
    sys.stdout.write(text + "\n")
    return EXIT_OK


def _images(tool: Tool, given: Parsed, name: str, whole_chain: bool) -> Iterator[Described]:
    """The image, and those below it, each opened by itself: a chain may be as long as it likes."""
    seen = set()
    next_name: str | None = name
    format = given.value("format")
    image_opts = given.flag("image-opts")
    while next_name is not None:
        if next_name in seen:
            raise UsageError(f"Backing file '{next_name}' creates an infinite loop.")
        seen.add(next_name)
        with open_image(
            tool,
            next_name,
            format=format,
            image_opts=image_opts,
            force_share=given.flag("force-share"),
            inspect=True,
        ) as image:
            described = Described(image.node)
        yield described
        if not whole_chain:
            return
        info = described.info
        next_name = info.full_backing_filename or info.backing_filename
        format, image_opts = info.backing_format, False


# For people ---------------------------------------------------------------------------------------


def human_lines(described: Described, path: str = "/", indent: str = "") -> Iterator[str]:
    """The lines about an image or, with the path of a child, about a part of it."""
    info = described.info
    if path != "/" and described.is_protocol:
        name, kind, length = "filename", "protocol type", "file length"
    else:
        name, kind, length = "image", "file format", "virtual size"
    size = size_to_str(info.virtual_size)
    yield f"{indent}{name}: {info.filename}"
    yield f"{indent}{kind}: {info.format}"
    yield f"{indent}{length}: {size} ({info.virtual_size} bytes)"
    used = "unavailable" if info.actual_size is None else size_to_str(info.actual_size)
    yield f"{indent}disk size: {used}"
    if info.encrypted:
        yield f"{indent}encrypted: yes"
    if info.cluster_size:
        yield f"{indent}cluster_size: {info.cluster_size}"
    if info.dirty:
        yield f"{indent}cleanly shut down: no"
    if info.backing_filename is not None:
        yield f"{indent}backing file: {info.backing_filename}{_actual_path(info)}"
        if info.backing_format is not None:
            yield f"{indent}backing file format: {info.backing_format}"
    if info.snapshots:
        from lamina.tools.img import snapshot_table

        yield "Snapshot list:"
        yield from snapshot_table.lines(info.snapshots)
    if info.specific:
        yield f"{indent}Format specific information:"
        yield from tree_lines(info.specific, indent + "    ")
    for role, child in described.children:
        below = f"{path.rstrip('/')}/{role}"
        yield f"{indent}Child node '{below}':"
        yield from human_lines(child, below, indent + "    ")


def _actual_path(info: NodeInfo) -> str:
    if info.full_backing_filename is None:
        return " (cannot determine actual path)"
    if info.full_backing_filename == info.backing_filename:
        return ""
    return f" (actual path: {info.full_backing_filename})"


# For programs -------------------------------------------------------------------------------------


def json_value(described: Described) -> dict[str, Any]:
    """As QEMU's schema has it, in the order in which QEMU prints it."""
    info = described.info
    value: dict[str, Any] = {
        "children": [
            {"name": role, "info": json_value(child)} for role, child in described.children
        ],
        "backing-filename-format": info.backing_format if info.backing_filename else None,
        "virtual-size": info.virtual_size,
        "filename": info.filename,
        "cluster-size": info.cluster_size or None,
        "format": info.format,
        "actual-size": info.actual_size,
        "format-specific": (
            None if info.specific is None else {"type": info.format, "data": info.specific}
        ),
        "full-backing-filename": info.full_backing_filename,
        "encrypted": True if info.encrypted else None,
        "compressed": True if info.compressed else None,
        "backing-filename": info.backing_filename,
        "dirty-flag": info.dirty,
    }
    if info.snapshots:
        from lamina.tools.img import snapshot_table

        snapshots = snapshot_table.json_values(info.snapshots)
        value = {"children": value.pop("children"), "snapshots": snapshots, **value}
    return {key: item for key, item in value.items() if item is not None}
