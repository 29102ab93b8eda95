"""Scattered reads are announced to the host while they are slow, and only then."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from lamina.block.node import NodeOptions
from lamina.block.opening import open_node
from lamina.block.session import Session
from lamina.protocols.file import cold

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="the host cannot be told what will be read"
)


class Clock:
    """A batch takes ``seconds`` for each of its reads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += self.seconds * 16
        return self.now


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def tell(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((offset, length))

    monkeypatch.setattr(cold, "_tell", tell)
    return found


def test_slow_batches_are_announced(
    tmp_path: Path, told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(1).randbytes(1 << 20)
    (tmp_path / "disk").write_bytes(content)
    clock = Clock()
    monkeypatch.setattr(cold.time, "perf_counter", clock.perf_counter)
    node = open_node(
        str(tmp_path / "disk"), session=Session(), defaults=NodeOptions(), protocol=True
    )
    places = [(number * 60_000, 4096) for number in range(16)]

    def batch() -> list[tuple[int, int]]:
        """What was announced of it."""
        told.clear()
        requests = [(offset, memoryview(bytearray(length))) for offset, length in places]
        node.readv(requests)
        assert all(buffer == content[offset : offset + 4096] for offset, buffer in requests)
        return list(told)

    clock.seconds = 5e-6
    assert batch() == batch() == []
    clock.seconds = 100e-6
    assert batch() == []  # it has turned out to be slow
    clock.seconds = 5e-6
    assert [batch() for _ in range(64)] == [places] * 64
    assert batch() == []  # another try, and the cache is warm now
    assert batch() == []
    node.close()


def test_few_reads_are_not_worth_it(
    tmp_path: Path, told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    clock = Clock()
    clock.seconds = 1.0
    monkeypatch.setattr(cold.time, "perf_counter", clock.perf_counter)
    node = open_node(
        str(tmp_path / "disk"), session=Session(), defaults=NodeOptions(), protocol=True
    )
    for _ in range(3):
        node.readv([(0, memoryview(bytearray(512))), (9000, memoryview(bytearray(512)))])
    assert told == []
    node.close()
