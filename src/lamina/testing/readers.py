"""What every image that is only read promises, as tests to inherit.

    class TestMyFormat(ReaderConformance):
        def make(self, content: bytes) -> Node:     # a node that reads as ``content``
            return open_mine(pack(content))
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.block.extents import Extent, Kind
from lamina.block.node import Node
from lamina.block.permissions import Perm
from lamina.errors import Refused
from lamina.hints import ClassVar

STEP = 64 << 10
"""Bytes that are alike in the content that is read."""


class ReaderConformance:
    size: ClassVar[int] = 1 << 20
    """Bytes of the disk."""
    seeds: ClassVar[int] = 2

    def make(self, content: bytes) -> Node:
        """A node, opened for reading, whose disk holds ``content``."""
        raise NotImplementedError

    path: Path
    """A directory of the test's own."""

    @pytest.fixture(autouse=True)
    def _disk(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path
        dice = random.Random(type(self).__name__)
        kinds = (
            lambda: dice.randbytes(STEP),
            lambda: bytes(STEP),
            lambda: (dice.randbytes(37) * (STEP // 37 + 1))[:STEP],
        )
        parts = [dice.choice(kinds)() for _ in range(-(-self.size // STEP))]
        self.content = b"".join(parts)[: self.size]
        self.node = self.make(self.content)
        self.node.used_by(None, "test", Perm.CONSISTENT_READ, Perm.ALL)
        yield
        self.node.close()

    def ranges(self, dice: random.Random, count: int) -> list[tuple[int, int]]:
        found = []
        for _ in range(count):
            offset = dice.randrange(self.size)
            if dice.random() < 0.5:
                offset -= offset % dice.choice((512, 4096, STEP))
            length = dice.choice((1, 512, 4096, dice.randrange(1, 3 * STEP)))
            found.append((offset, min(length, self.size - offset)))
        return found

    def test_all_of_it(self) -> None:
        assert self.node.size == self.size
        assert self.node.read(0, self.size) == self.content

    def test_parts_of_it(self) -> None:
        for seed in range(self.seeds):
            for offset, length in self.ranges(random.Random(seed), 60):
                assert self.node.read(offset, length) == self.content[offset : offset + length]

    def test_batches(self) -> None:
        for seed in range(self.seeds):
            ranges = self.ranges(random.Random(seed), 40)
            buffers = [bytearray(length) for _, length in ranges]
            places = zip((offset for offset, _ in ranges), buffers, strict=True)
            self.node.readv([(offset, memoryview(buffer)) for offset, buffer in places])
            for (offset, length), buffer in zip(ranges, buffers, strict=True):
                assert buffer == self.content[offset : offset + length]
        self.node.readv([])
        self.node.readv([(0, memoryview(bytearray()))])

    def test_several_readers(self) -> None:
        wrong: list[int] = []

        def work(seed: int) -> None:
            for offset, length in self.ranges(random.Random(seed), 60):
                if self.node.read(offset, length) != self.content[offset : offset + length]:
                    wrong.append(offset)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_extents_tell_the_truth(self) -> None:
        for offset, length in ((0, self.size), *self.ranges(random.Random(3), 40)):
            at = offset
            for extent in self.node.extents(offset, length):
                assert extent.guest_offset == at
                assert extent.length > 0
                self._check(extent, self.content[at : extent.end])
                at = extent.end
            assert at == offset + length

    def _check(self, extent: Extent, content: bytes) -> None:
        if extent.kind is Kind.ZERO:
            assert not any(content)
        elif extent.kind is Kind.DATA:
            assert extent.node is not None
            assert extent.node.read(extent.host_offset, extent.length) == content
        elif extent.kind is Kind.ENCODED:
            assert extent.unit_offset <= extent.guest_offset
            assert extent.end <= extent.unit_offset + extent.unit_length

    def test_columns_are_the_same_as_extents(self) -> None:
        for offset, length in ((0, self.size), *self.ranges(random.Random(4), 20)):
            rows: list[tuple[int, ...]] = []
            for piece in self.node.columns(offset, length):
                columns = (piece.guest_offset, piece.length, piece.kind, piece.host_offset)
                rows += zip(*(column.tolist() for column in columns), strict=True)
            found: list[tuple[int, ...]] = [
                (one.guest_offset, one.length, int(one.kind), one.host_offset)
                for one in self.node.extents(offset, length)
            ]
            assert _joined(rows) == _joined(found)

    def test_nobody_writes(self) -> None:
        assert self.node.read_only
        with pytest.raises(Refused):
            self.node.used_by(None, "writer", Perm.WRITE, Perm.ALL)
        with pytest.raises(Refused) as caught:
            self.node.reopen(read_only=False)
        assert str(caught.value) == "Image is read-only"
        assert caught.value.errno == errno.EACCES
        assert self.node.read_only
        assert self.node.read(0, self.size) == self.content

    def test_info(self) -> None:
        info = self.node.info()
        assert info.virtual_size == self.size
        assert info.format == self.node.driver
        assert info.snapshots == []


def _joined(rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Runs of one kind as one; encoded units each by itself."""
    joined: list[tuple[int, ...]] = []
    for offset, length, kind, host in rows:
        if joined:
            start, before, last, place = joined[-1]
            adjoins = host == place + before if place >= 0 else host == place
            if last == kind != Kind.ENCODED and adjoins:
                joined[-1] = (start, before + length, last, place)
                continue
        joined.append((offset, length, kind, host))
    return joined
