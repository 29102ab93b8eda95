"""length, info, alloc, map: what is known about the image without reading it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Kind
from lamina.hints import TYPE_CHECKING
from lamina.tools.io.numbers import number
from lamina.tools.io.report import amount
from lamina.tools.output import tree_lines

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.tools.io.shell import Shell

_STEP = 1 << 36
"""Bytes that are asked about at a time."""
_DEFAULT_COUNT = 512


def run_length(shell: Shell, arguments: Sequence[str]) -> None:
    shell.say(f"{amount(shell.backend.size)}\n")


# -- info ------------------------------------------------------------------------------------------


def run_info(shell: Shell, arguments: Sequence[str]) -> None:
    from lamina.block import registry

    node = shell.node
    lines = [f"format name: {node.driver}"]
    if registry.is_protocol(node.driver):
        # QEMU shows the name of the protocol as well, under the same heading.
        lines *= 2
    # Filters have no tables of their own: what they filter answers for them.
    inner = node.unfiltered
    lines.append(f"cluster size: {amount(inner.info().cluster_size or 0)}")
    lines.append(f"vm state offset: {amount(inner.vmstate_offset)}")
    specific = node.info().specific
    if specific:
        lines.append("Format specific information:")
        lines += tree_lines(specific, "    ")
    shell.say("\n".join(lines) + "\n")


# -- allocation ------------------------------------------------------------------------------------


def run_alloc(shell: Shell, arguments: Sequence[str]) -> None:
    offset = number(arguments[0])
    count = number(arguments[1]) if len(arguments) > 1 else _DEFAULT_COUNT
    node = shell.backend.node
    # What lies behind the end of the disk is not counted.
    count = max(min(count, node.size - offset), 0)
    held = sum(length for _, length, here in allocated(node, offset, offset + count) if here)
    shell.say(f"{held}/{count} bytes allocated at offset {amount(offset)}\n")


def run_map(shell: Shell, arguments: Sequence[str]) -> None:
    node = shell.backend.node
    text = ""
    for offset, length, here in allocated(node, 0, node.size):
        word = "    allocated" if here else "not allocated"
        text += (
            f"{amount(length)} ({length:#x}) bytes {word} "
            f"at offset {amount(offset)} ({offset:#x})\n"
        )
    shell.say(text)


def allocated(node: Node, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether this image holds it itself), in order, neighbours joined.

    The backing file is not asked. A raw file holds its holes as well.
    """
    top = node.unfiltered
    run: tuple[int, int, bool] | None = None
    for start in range(offset, end, _STEP):
        for extent in top.extents(start, min(_STEP, end - start)):
            here = extent.kind is not Kind.BELOW
            if run is not None and run[2] == here:
                run = (run[0], run[1] + extent.length, here)
                continue
            if run is not None:
                yield run
            run = (extent.guest_offset, extent.length, here)
    if run is not None:
        yield run
