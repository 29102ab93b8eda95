"""``dd``: the same bytes, and zeroes written as QEMU's tool writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import assert_twins_are_equal, content, make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer

INCOMPLETE_SECTORS = ("bs=100 count=7", "bs=1 count=513 skip=511")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "operands",
    [
        "",
        "bs=64k count=20 skip=3",
        "bs=1k skip=100",
        *INCOMPLETE_SECTORS,
        "bs=1M count=1 skip=1",
        "bs=4k skip=100000",
        "count=0",
    ],
)
def test_dd(
    operands: str,
    format: str,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    words = ["-O", format, "if=middle.qcow2", f"of=out.{format}", *operands.split()]
    ours, theirs = twins.run("dd", *words)
    assert ours == theirs
    name = f"out.{format}"
    if format == "qcow2" and operands in INCOMPLETE_SECTORS:
        # How much of the last sector lies in the file is nobody's business.
        assert content(twins.ours / name) == content(twins.theirs / name)
    else:
        assert_twins_are_equal(twins, name)
