"""Internal snapshots between us and QEMU: what one makes, the other lists, applies and deletes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer

OURS = str(Path(sys.executable).with_name("lamina-img"))
SIZE = 2 << 20


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4k,refcount_bits=8", "compat=0.10"]
)
@pytest.mark.parametrize("seed", range(2))
def test_turn_and_turn_about(tmp_path, options, seed):
    rng = random.Random(seed)
    image, raw = tmp_path / "image.qcow2", tmp_path / "raw"
    run(OURS, "create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    content = bytearray(SIZE)
    kept: dict[str, bytes] = {}
    for step in range(14):
        tool = rng.choice([OURS, "qemu-img"])
        io = rng.choice([str(Path(sys.executable).with_name("lamina-io")), "qemu-io"])
        offset = rng.randrange(0, SIZE - 100_000, 512)
        run(io, "-c", f"write -P {step + 1} {offset} 100000", image)
        content[offset : offset + 100_000] = bytes([step + 1]) * 100_000
        action = rng.choice(["-c", "-c", "-a", "-d"]) if kept else "-c"
        name = f"s{step}" if action == "-c" else rng.choice(sorted(kept))
        run(tool, "snapshot", action, name, image)
        if action == "-c":
            kept[name] = bytes(content)
        elif action == "-a":
            content[:] = kept[name]
        else:
            del kept[name]
        run("qemu-img", "check", image)
        run("qemu-img", "convert", "-O", "raw", image, raw)
        assert raw.read_bytes() == content, f"{tool} {action} {name}"
    assert run(OURS, "snapshot", "-l", image) == run("qemu-img", "snapshot", "-l", image)
    for name, expected in kept.items():
        for tool in (OURS, "qemu-img"):
            run(tool, "convert", "-l", name, "-O", "raw", image, raw)
            assert raw.read_bytes() == expected, f"{tool} convert -l {name}"
