"""``compare``: what the other tests of the command line cannot see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .chain import make_twins
from .conftest import LaminaImg

pytestmark = pytest.mark.peer

FAILING = (
    "json:{{'driver':'blkdebug','image':{{'driver':'qcow2','file':"
    "{{'driver':'file','filename':'base.qcow2'}}}},'inject-error':"
    "[{{'event':'none','iotype':'{}','errno':5,'sector':130}}]}}"
)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("iotype", "code"), [("read", 4), ("block-status", 3)]
)
def test_exit_codes_tell_what_went_wrong(
    iotype: str,
    code: int,
    swap: bool,
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    twins.run("convert", "-O", "raw", "base.qcow2", "copy.raw")
    names = [FAILING.format(iotype), "copy.raw"]
    ours, theirs = twins.run("compare", *(names[::-1] if swap else names))
    assert ours == theirs
    assert ours.code == code


@pytest.mark.parametrize("strict", [(), ("-s",)])
@pytest.mark.parametrize(
    "pair",
    [
        ("base.qcow2", "middle.qcow2"),
        ("middle.qcow2", "raw.raw"),
        ("top.qcow2", "top.qcow2"),
        ("other.qcow2", "raw.raw"),
    ],
)
def test_pairs(
    pair: tuple[str, str],
    strict: tuple[str, ...],
    tmp_path: Path,
    in_folder: Callable[[Path], None],
    lamina_img: LaminaImg,
) -> None:
    twins = make_twins(tmp_path, in_folder, lamina_img)
    ours, theirs = twins.run("compare", *strict, *pair)
    assert ours == theirs
    ours, theirs = twins.run("compare", "-p", *strict, *pair)
    assert ours.stdout.split("\r")[-1] == theirs.stdout.split("\r")[-1]
