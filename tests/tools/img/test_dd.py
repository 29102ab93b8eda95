"""``dd``: the same bytes, and zeroes written as QEMU's tool writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import assert_twins_are_equal, make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "operands",
    [
        "",
        "bs=64k count=20 skip=3",
        "bs=1k skip=100",
        "bs=100 count=7",
        "bs=1 count=513 skip=511",
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
    assert_twins_are_equal(twins, f"out.{format}")
