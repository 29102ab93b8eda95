"""A short run of the fuzzers, with a seed that never changes; ``million`` is the long one."""

from __future__ import annotations

import os
import sys

from tests.fuzz.headers import fuzz_headers, fuzz_tables
from tests.fuzz.images import fuzz_images


def test_headers() -> None:
    accepted = fuzz_headers(30_000)
    assert 3_000 < accepted < 27_000


def test_tables() -> None:
    fuzz_tables(20_000)


def test_images_and_nothing_else_is_opened() -> None:
    opened: list[str] = []
    listening = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event in ("open", "socket.connect", "subprocess.Popen"):
            opened.append(os.fsdecode(str(arguments[0])))

    # Everything that is imported late is imported now.
    fuzz_images(40, seed=1)
    sys.addaudithook(hook)
    try:
        reached = fuzz_images(400)
    finally:
        listening = False
    assert [name for name in opened if not name.endswith((".py", ".pyc", ".so"))] == []
    assert reached["read"] > 100
    assert reached["clean"] > 250
