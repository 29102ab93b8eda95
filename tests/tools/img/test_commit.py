"""``commit``: base and overlay are afterwards what QEMU's tool makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import assert_twins_are_equal, make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    "command",
    [
        "commit top.qcow2",
        "commit -q -d top.qcow2",
        "commit -b base.qcow2 top.qcow2",
        "commit -t none middle.qcow2",
        "commit -r 100M middle.qcow2",
        "commit --image-opts driver=qcow2,file.filename=top.qcow2",
        "commit -b top.qcow2 top.qcow2",
        "commit base.qcow2",
    ],
)
def test_commit(
    command: str,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run(*command.split())
    assert ours == theirs
    # What lies between is no longer valid where a commit passes it by.
    passed_by = "-b base" in command
    images = ["base.qcow2", "top.qcow2"] + ([] if passed_by else ["middle.qcow2"])
    assert_twins_are_equal(twins, *images)


def test_a_raw_base_grows(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    twins.run("create", "-q", "-f", "qcow2", "-b", "raw.raw", "-F", "raw", "new.qcow2", "5M")
    twins.run("convert", "-n", "-O", "qcow2", "other.qcow2", "new.qcow2")
    ours, theirs = twins.run("commit", "new.qcow2")
    assert ours == theirs
    assert (twins.ours / "raw.raw").stat().st_size == 5 << 20
    assert_twins_are_equal(twins, "raw.raw", "new.qcow2")


def test_a_failing_base_leaves_the_overlay_as_it_is(
    tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    base = (
        "json:{'driver':'qcow2','file':{'driver':'blkdebug',"
        "'image':{'driver':'file','filename':'base.qcow2'},"
        "'inject-error':[{'event':'write_aio','errno':28,'once':true}]}}"
    )
    twins.run("rebase", "-u", "-b", base, "-F", "qcow2", "middle.qcow2")
    ours, theirs = twins.run("commit", "middle.qcow2")
    assert ours == theirs
    assert ours.stderr == "qemu-img: Block job failed: No space left on device\n"
    assert_twins_are_equal(twins, "middle.qcow2")
