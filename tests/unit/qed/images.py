"""QED images in memory."""

from __future__ import annotations

from lamina.block.driver import CheckResult, Fix
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.formats.qed import DRIVER
from lamina.formats.qed.create import create
from lamina.formats.qed.opening import open_disk
from lamina.formats.qed.options import QedCreateOptions
from lamina.testing.context import NodesContext
from lamina.testing.memory import MemoryFile

UNIT = 4096
NOTHING, LEAKS, ALL = Fix(), Fix(leaks=True), Fix(leaks=True, errors=True)


def make(size: int, *, cluster_size: int = UNIT, table_size: int = 1, **options: str) -> bytes:
    """An image whose tables are small, so that little data needs many of them."""
    file = MemoryFile()
    settled = QedCreateOptions(size, cluster_size=cluster_size, table_size=table_size, **options)
    create(settled, file)
    return bytes(file.content)


def open_image(file: Node, backing: bytes | None = None, *, check: bool = False) -> Disk:
    below = None
    if backing is not None:
        below = MemoryFile(backing, NodeOptions(read_only=True, filename="below"))
    context = NodesContext(file, backing=below)
    context.check = check
    return open_disk(context)


def check(content: bytes, fix: Fix = NOTHING) -> tuple[CheckResult, bytes]:
    """What a check finds, and the image afterwards."""
    file = MemoryFile(content, NodeOptions(read_only=fix == NOTHING, filename="memory"))
    disk = open_image(file, check=True)
    result = DRIVER.check(disk, fix, lambda line: None)
    disk.close()
    return result, bytes(file.content)
