"""A short run of the fuzzers, with a seed that never changes; ``million`` is the long one."""

from __future__ import annotations

from tests.fuzz.headers import fuzz_headers, fuzz_tables
from tests.fuzz.images import fuzz_images
from tests.unit.opened import opened_files


def test_headers() -> None:
    accepted = fuzz_headers(30_000)
    assert 3_000 < accepted < 27_000


def test_tables() -> None:
    fuzz_tables(20_000)


def test_images_and_nothing_else_is_opened() -> None:
    reached: dict[str, int] = {}
    # Everything that is imported late is imported now.
    fuzz_images(40, seed=1)
    assert opened_files(lambda: reached.update(fuzz_images(400))) == []
    assert reached["read"] > 100
    assert reached["clean"] > 250
