"""A short run over damaged images of qed, vdi and vpc, with a seed that never changes."""

from __future__ import annotations

import pytest

from tests.fuzz.tables import fuzz_tables, seeds


@pytest.mark.parametrize("kind", ["qed", "vdi", "vpc", "vpc-child", "vpc-fixed"])
def test_tables(kind: str) -> None:
    reached = fuzz_tables(seeds()[kind], 25 if kind == "vdi" else 200)
    assert reached["opened"] > 8
    assert reached["clean"] > 5
