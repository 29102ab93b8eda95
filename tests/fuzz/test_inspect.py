"""Inspecting damaged images: our errors only, in bounded time and memory, opening nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lamina
from tests.unit.dmg.images import pack as pack_dmg
from tests.unit.test_bochs import redolog
from tests.unit.test_cloop import pack as pack_cloop

FORMATS = [
    *("raw", "qcow2", "qcow", "qed", "vdi", "vmdk", "vpc", "parallels"),
    *("bochs", "cloop", "dmg"),
]
READ_ONLY = {"bochs": redolog, "cloop": pack_cloop, "dmg": pack_dmg}
"""Formats that we make no images of, and what makes one out of the content of a disk."""
SECONDS = 2.0
"""Of processor time: one is the aim, and some machines are slow."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small image of each format; those that can name a backing file do."""
    home = tmp_path_factory.mktemp("images")
    found = {}
    for format in FORMATS:
        path = home / format
        if format in READ_ONLY:
            found[format] = READ_ONLY[format](b"content " * 8192)
            continue
        backing = {"backing_file": str(home / "raw")} if format.startswith("q") else {}
        if backing:
            backing["backing_format"] = "raw"
        lamina.create(path, format, "1M", **backing)
        found[format] = path.read_bytes()
    return found


MUTATIONS = st.lists(
    st.tuples(
        # Headers are at the start: that is where most of the damage should go.
        st.integers(0, 160) | st.integers(0, 70_000),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 4]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "guessed"])
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutations=MUTATIONS, cut=st.none() | st.integers(0, 2000))
def test_damaged_images(
    images: dict[str, bytes],
    tmp_path: Path,
    format: str,
    named: bool,
    mutations: list[tuple[int, bytes]],
    cut: int | None,
) -> None:
    data = bytearray(images[format])
    for offset, junk in mutations:
        data[offset : offset + len(junk)] = junk
    path = tmp_path / "image"
    path.write_bytes(data[:cut])
    start = time.process_time()
    with contextlib.suppress(lamina.LaminaError):
        info = lamina.inspect(path, format=format if named else None)
        assert info.virtual_size >= 0
    assert time.process_time() - start < SECONDS
    assert not any(_opens(fd, tmp_path) for fd in os.listdir("/proc/self/fd"))


def _opens(fd: str, home: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(home))
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
@pytest.mark.parametrize("format", FORMATS[1:])
def test_memory_is_bounded(images: dict[str, bytes], tmp_path: Path, format: str) -> None:
    """Every 32-bit field of the header in turn says "very many", and there is a lot to read."""
    (tmp_path / "image").write_bytes(images[format])
    code = f"""
        import resource, sys, time
        import lamina
        data = open("image", "rb").read()
        lamina.inspect("image")
        for line in open("/proc/self/status"):
            if line.startswith("VmData:"):
                limit = int(line.split()[1]) * 1024 + (64 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        for offset in range(4, 112, 4):
            for value in (0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF, 0x10000):
                changed = bytearray(data)
                changed[offset : offset + 4] = value.to_bytes(4, "big")
                with open("image", "wb") as file:
                    file.write(changed)
                    file.truncate(1 << 26)
                start = time.process_time()
                try:
                    lamina.inspect("image", format="{format}")
                except lamina.LaminaError:
                    pass
                spent = time.process_time() - start
                assert spent < {SECONDS}, (offset, value, spent)
        """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path, timeout=200
    )
