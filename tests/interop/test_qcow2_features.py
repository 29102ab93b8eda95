"""Any three features of qcow2 together: made, written to and amended by us and QEMU in turns."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from tests.interop.qcow2_turns import Batch, do_batch
from tests.unit.qcow2.features import as_new, covering

pytestmark = pytest.mark.peer

PARTS = 10
"""Of what takes a minute, so that they run side by side."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@lru_cache
def triples(*, acceptable: bool) -> Batch:
    return list(enumerate(covering(3, acceptable=acceptable)))


@pytest.mark.parametrize("part", range(PARTS))
def test_both_work_on_one_image(part: int) -> None:
    assert do_batch(triples(acceptable=True)[part::PARTS]) == []


def test_both_make_the_same_images_or_refuse_them() -> None:
    new = [(number, as_new(choice)) for number, choice in triples(acceptable=False)]
    assert do_batch(new, new=True) == []
