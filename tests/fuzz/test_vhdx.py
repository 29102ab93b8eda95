"""A short run of the fuzzers of VHDX, with a seed that never changes; and damaged files inspected.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from pathlib import Path

import lamina
from lamina.units import KIB, MIB
from tests.fuzz.mutation import mutate
from tests.fuzz.vhdx import fuzz_images, fuzz_structures
from tests.unit.opened import opened_files

SECONDS = 2.0
"""Of processor time."""


def test_structures() -> None:
    accepted = fuzz_structures(6_000)
    assert 600 < accepted < 5_400


def test_images_and_nothing_else_is_opened() -> None:
    reached: dict[str, int] = {}
    # Everything that is imported late is imported now.
    fuzz_images(30, seed=1)
    assert opened_files(lambda: reached.update(fuzz_images(150))) == []
    assert reached["read"] > 50
    assert reached["clean"] > 50


def test_inspecting_damaged_files(tmp_path: Path) -> None:
    """Through the front door: our errors only, in bounded time, opening nothing else."""
    base, path = tmp_path / "base", tmp_path / "image"
    lamina.create(base, "vhdx", "20M")
    lamina.create(path, "vhdx", "20M", backing_file=str(base), backing_format="vhdx")
    starts = [0, 64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB, 3 * MIB, 3 * MIB + 64 * KIB]
    rng = random.Random(5)
    inspected = 0
    with open(path, "r+b") as file:
        for _ in range(300):
            at = rng.choice(starts)
            before = os.pread(file.fileno(), 320, at)
            os.pwrite(file.fileno(), mutate(rng, before, [(0, 320)]), at)
            start = time.process_time()
            with suppress(lamina.LaminaError):
                info = lamina.inspect(path, format=rng.choice(["vhdx", None]))
                assert info.virtual_size >= 0
                inspected += 1
            assert time.process_time() - start < SECONDS
            os.pwrite(file.fileno(), before, at)
    assert 50 < inspected < 300
