"""Files to open without the machinery of ``block.opening``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamina.block.node import NodeOptions
from lamina.block.permissions import Perm
from lamina.protocols.file import DRIVER, FileOptions
from lamina.protocols.file.node import FileNode

Opener = Callable[..., FileNode]


@pytest.fixture
def open_file() -> Iterator[Opener]:
    """``open_file(path, direct=…, locking=…, writer=True, …)``; closed at the end."""
    nodes: list[FileNode] = []

    def open_one(
        path: Path, *, writer: bool = True, options: dict[str, Any] | None = None, **generic: Any
    ) -> FileNode:
        generic.setdefault("read_only", not writer)
        generic.setdefault("unmap", True)
        context = SimpleNamespace(node_options=NodeOptions(filename=str(path), **generic))
        node = DRIVER.open(FileOptions(filename=str(path), **(options or {})), context)
        assert isinstance(node, FileNode)
        nodes.append(node)
        if writer:
            node.used_by(None, "test", Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, Perm.ALL)
        return node

    yield open_one
    for node in nodes:
        node.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 1 MiB that is one hole."""
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    return path
