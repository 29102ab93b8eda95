"""``rebase``: content stays, and as much is copied as QEMU's tool copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import assert_twins_are_equal, content, make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    "command",
    [
        "rebase -b base.qcow2 -F qcow2 top.qcow2",
        "rebase -b other.qcow2 -F qcow2 top.qcow2",
        "rebase -c -b other.qcow2 -F qcow2 top.qcow2",
        "rebase -b raw.raw -F raw top.qcow2",
        "rebase -t none -T none -b raw.raw -F raw top.qcow2",
        "rebase -b middle.qcow2 -F qcow2 top.qcow2",
        "rebase -c --backing= top.qcow2",
        "rebase --backing= top.qcow2",
        "rebase -b top.qcow2 -F qcow2 other.qcow2",
        "rebase --image-opts driver=qcow2,file.filename=top.qcow2 -b other.qcow2 -F qcow2",
    ],
)
def test_content_stays(
    command: str,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    name = "other.qcow2" if command.endswith("other.qcow2") else "top.qcow2"
    before = content(twins.ours / name)
    ours, theirs = twins.run(*command.split())
    assert ours == theirs
    assert ours.code == 0
    assert content(twins.ours / name) == before
    assert_twins_are_equal(twins, name)
    ours, theirs = twins.run("info", "--output=json", name)
    assert [line for line in ours.stdout.splitlines() if "backing" in line] == [
        line for line in theirs.stdout.splitlines() if "backing" in line
    ]


def test_unsafe_changes_the_name_alone(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run("rebase", "-u", "-b", "nowhere", "-F", "raw", "top.qcow2")
    assert ours == theirs
    ours, theirs = twins.run("rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2")
    assert ours == theirs
    assert_twins_are_equal(twins, "top.qcow2")
