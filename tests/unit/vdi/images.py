"""VDI images in memory."""

from __future__ import annotations

from lamina.block.driver import CheckResult, Fix
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.vdi import DRIVER
from lamina.formats.vdi.create import create
from lamina.formats.vdi.layout import DIFFERENCING
from lamina.formats.vdi.opening import open_disk
from lamina.formats.vdi.options import VdiCreateOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

UNIT = 1 << 20
NOTHING, LEAKS, ALL = Fix(), Fix(leaks=True), Fix(leaks=True, errors=True)
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")


def make(size: int, *, static: bool = False, parent: bytes = b"") -> bytes:
    """``parent``: the UUID of what this image differs from."""
    file = MemoryFile()
    create(VdiCreateOptions(size, static), file)
    if parent:
        file.content[0x4C] = DIFFERENCING
        file.content[0x1A8:0x1B8] = parent
    return bytes(file.content)


def open_image(file: Node, backing: Node | None = None, *, check: bool = False) -> Disk:
    context = NodesContext(file, backing=backing)
    context.check = check
    return open_disk(context)


def check(content: bytes, fix: Fix = NOTHING) -> tuple[CheckResult, list[str], bytes]:
    """What a check finds and says, and the image afterwards."""
    file = MemoryFile(content, NodeOptions(read_only=fix == NOTHING, filename="memory"))
    lines: list[str] = []
    disk = open_image(file, check=True)
    result = DRIVER.check(disk, fix, lines.append)
    disk.close()
    return result, lines, bytes(file.content)
