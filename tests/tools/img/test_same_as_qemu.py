"""The same words and exit codes as QEMU's tool, command line by command line.

The command lines are in ``same_as_qemu/``, a file per subcommand; a copy of the gallery of images
is there when one runs. ``--help`` is not among them: its words are our own.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LaminaImg, qemu_img

FILES = sorted(Path(__file__).with_name("same_as_qemu").glob("*.txt"))
CASES = [line for file in FILES for line in file.read_text().splitlines() if line]

READERS = ("bench", "compare", "info", "map", "measure")
"""Subcommands that change nothing, so that they need no copies."""


@pytest.mark.peer
@pytest.mark.parametrize("line", CASES)
def test_same(
    line: str,
    gallery: Path,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    arguments = shlex.split(line)
    if arguments[0] in READERS:
        ours = theirs = gallery
    else:
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        for copy in (ours, theirs):
            subprocess.run(["cp", "-r", "--sparse=always", gallery, copy], check=True)
    in_folder(theirs)
    expected = qemu_img(*arguments)
    in_folder(ours)
    assert lamina_img(*arguments) == expected
    assert files(ours) == files(theirs)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
