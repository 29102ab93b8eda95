"""``bench``: the same requests as QEMU's tool, in the same words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import content, make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    "options",
    [
        "-c 100",
        "-c 100 -d 1 -S 68k",
        "-c 7 -s 1k -S 3k -o 1M",
        "-c 30 -w --pattern 17",
        "-c 9 -d 2 -w --pattern 0x21 -s 8k -S 300k -o 4k",
        "-c 20 -d 4 -w --flush-interval 8",
        "-c 20 -d 4 -w --flush-interval 8 --no-drain",
        "-c 20 -i io_uring",
        "-c 20 -q -t unsafe",
    ],
)
@pytest.mark.parametrize("image", ["raw.raw", "other.qcow2"])
def test_bench(
    image: str,
    options: str,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    format = "raw" if image.endswith("raw") else "qcow2"
    ours, theirs = twins.run("bench", "-f", format, *options.split(), image)
    times = re.compile(r"in \d+\.\d{3} seconds")
    assert times.search(ours.stdout)
    assert times.sub("", ours.stdout) == times.sub("", theirs.stdout)
    assert (ours.code, ours.stderr) == (theirs.code, theirs.stderr)
    assert content(twins.ours / image) == content(twins.theirs / image)
