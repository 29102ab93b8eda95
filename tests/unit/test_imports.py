"""Imports run downward only, and drivers never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lamina

SOURCE = Path(lamina.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = [
    {"errors", "hints", "units", "records", "tuples", "buffers"},
    {"codecs", "ciphers", "wire"},
    {"block"},
    {"engine"},
    {"protocols", "formats", "filters", "vfat"},
    {"jobs", "exports", "__init__", "image", "bitmaps"},
    {"tools"},
]
DRIVERS = {"protocols", "formats", "filters", "vfat"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def room(parts: tuple[str, ...]) -> str:
    """The folder of a module below ``lamina``: ``("block", "node")`` -> ``block``."""
    return parts[0] if parts else "__init__"


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules below ``lamina`` that a file imports, also inside functions; not for types only."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "lamina":
                names = [f"lamina.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            if name == "lamina" or name.startswith("lamina."):
                found.add(tuple(name.split(".")[1:]))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path: Path) -> None:
    own = path.relative_to(SOURCE).with_suffix("").parts
    own_room = room(own)
    if own_room == "testing":  # looks at everything, is used by nothing
        return
    for other in imports(path):
        assert room(other) != "testing", f"{path} imports lamina.{'.'.join(other)}"
        if room(other) not in RANK:
            continue
        assert RANK[room(other)] <= RANK[own_room], f"{path} imports lamina.{'.'.join(other)}"
        if own_room in DRIVERS and room(other) in DRIVERS:
            assert other[:2] == (*own[:1], own[1].removesuffix(".py")), (
                f"{path} imports another driver: lamina.{'.'.join(other)}"
            )
