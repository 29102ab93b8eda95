"""``map`` of images with many clusters, where arrays take the place of objects."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lamina.block.backend import Backend
from lamina.block.session import Session
from lamina.jobs import map as mapping
from lamina.tools.bulk import decimal, lines, words

from .conftest import LaminaImg, qemu_img

CLUSTER = 512
SIZE = CLUSTER * (mapping._MANY_UNITS + 500)


def scribble(image: str, seed: int) -> None:
    """Write here and there: data, zeroes, compressed clusters, and holes again."""
    chance = random.Random(seed)
    commands = []
    for _ in range(150):
        cluster = chance.randrange(SIZE // CLUSTER - 64)
        length = chance.randrange(1, 64) * CLUSTER
        verb = chance.choice(("write", "write", "write -z", "write -zu", "discard", "write -c"))
        if verb == "write -c":
            length = CLUSTER
        commands += ["-c", f"{verb} {cluster * CLUSTER} {length}"]
    subprocess.run(["qemu-io", *commands, image], check=True, capture_output=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    options = ("-f", "qcow2", "-o", f"cluster_size={CLUSTER}")
    base, top = str(folder / "base.qcow2"), str(folder / "top.qcow2")
    if qemu_img("create", *options, base, str(SIZE - 100 * CLUSTER)).code:
        pytest.skip("needs qemu-img")
    qemu_img("create", *options, "-b", base, "-F", "qcow2", top, str(SIZE))
    scribble(base, 1)
    scribble(top, 2)
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("window", [(), ("--start-offset", "1000001", "--max-length", "30M")])
@pytest.mark.parametrize("image", ["base.qcow2", "top.qcow2"])
def test_many_clusters_as_qemu_shows_them(
    image: str,
    window: tuple[str, ...],
    images: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    in_folder(images)
    arguments = ("map", "--output=json", *window, image)
    assert lamina_img(*arguments) == qemu_img(*arguments)


@pytest.mark.peer
@pytest.mark.parametrize("image", ["base.qcow2", "top.qcow2"])
def test_arrays_say_what_objects_say(
    image: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_BLOCK", 7)
    monkeypatch.setattr(mapping, "_STEP", 100 * CLUSTER)
    with Backend.open(str(images / image), session=Session()) as disk:
        by_arrays = rows(mapping._joined(mapping._from_columns(disk.node, 512, SIZE - 1024)))
        by_objects = rows(mapping._joined(mapping._from_extents(disk.node, 512, SIZE - 1024)))
    assert len(by_objects) > 100
    assert by_arrays == by_objects


def rows(blocks: Iterator[mapping.Rows]) -> list[tuple[int, int, mapping.Fate, int]]:
    return [
        (start, length, block.fates[fate], offset)
        for block in blocks
        for start, length, fate, offset in zip(*block.as_lists(), strict=True)
    ]


def test_bulk_text_is_the_text_of_each_line() -> None:
    chance = random.Random(3)
    numbers = [chance.randrange(10 ** chance.randrange(1, 19)) for _ in range(500)]
    numbers += [0, 9, 10, 9999, 10000, -1, (1 << 63) - 1]
    names = ["", "a", "data"]
    index = [chance.randrange(3) for _ in numbers]
    expected = "".join(
        f"<{number if number >= 0 else ''}|{names[one]}>\n"
        for number, one in zip(numbers, index, strict=True)
    )
    parts = ("<", decimal(np.array(numbers)), "|", words(names, np.array(index)), ">\n")
    assert lines(parts) == expected
