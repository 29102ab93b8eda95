"""Inspecting a small image starts quickly: it imports what it needs and nothing heavy."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.block.creation import create_image
from lamina.block.session import Session

ALLOWED = """
buffers errors hints records tuples units tools tools.arguments tools.opening tools.output
tools.tool tools.img tools.img.command tools.img.info block block.alignment block.backend
block.cache_modes block.driver block.extents block.filenames block.info block.keyvalue block.limits
block.node block.opening block.options block.permissions block.policy block.probing block.registry
block.secrets block.session protocols protocols.file protocols.file.cold protocols.file.holes
protocols.file.locks protocols.file.node protocols.file.opening protocols.file.transfer engine
engine.batches engine.cache engine.copies engine.disk engine.locks engine.mapping engine.metadata
engine.reader engine.workers engine.writer formats formats.qcow2 formats.qcow2.about
formats.qcow2.layout formats.qcow2.opening formats.qcow2.options formats.qcow2.overlap
formats.qcow2.settings block.generic_options block.opening_context formats.qcow2.extensions
formats.qcow2.fields
"""
"""Of our own modules, those that ``info`` of a qcow2 image may import."""

CHEAP = """
__future__ _bisect _collections _functools _operator _struct _weakrefset bisect collections
collections.abc contextlib enum errno fcntl functools gc itertools keyword mmap operator os reprlib
stat struct sys threading time types
"""
"""Of the standard library, those that cost little or that every interpreter has anyway."""

FACTOR = 4
"""``info`` may take this many times what the interpreter needs for nothing at all."""

SCRIPT = "import sys; from lamina.tools.img import main; sys.argv[0] = 'lamina-img'; main()"


@pytest.fixture
def image(tmp_path: Path) -> str:
    name = str(tmp_path / "small.qcow2")
    create_image(name, "qcow2", session=Session(), size=1 << 20)
    return name


def test_info_imports_nothing_heavy(image: str) -> None:
    def loaded(*command: str) -> set[str]:
        log = subprocess.run(
            [sys.executable, "-X", "importtime", *command], capture_output=True, text=True
        ).stderr
        return {line.rpartition("|")[2].strip() for line in log.splitlines() if "|" in line}

    ours = loaded("-c", SCRIPT, "info", image) - loaded("-c", "pass")
    assert "lamina.tools.img.info" in ours
    allowed = {"lamina", *CHEAP.split(), *(f"lamina.{name}" for name in ALLOWED.split())}
    assert sorted(ours - allowed) == []


def test_info_starts_quickly(image: str) -> None:
    """As if installed: with the modules compiled, whatever the environment of the tests says."""
    resource = pytest.importorskip("resource")
    compileall.compile_dir(Path(lamina.__file__).parent, quiet=1)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}

    def seconds(*command: str) -> float:
        """Of the processor: others use the machine as well."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    nothing, info = [], []
    for _ in range(15):
        nothing.append(seconds("-c", "pass"))
        info.append(seconds("-c", SCRIPT, "info", image))
    assert min(info) <= FACTOR * min(nothing)
