from __future__ import annotations

import random

import pytest

from lamina.block.extents import Kind
from lamina.block.node import Node
from lamina.block.status import Status, chain_columns, chain_extents
from tests.unit.jobs.memory import MemoryDisk, SparseFile

K = 1024


def summary(found: list[Status]) -> list[tuple[int, int, Kind, int, bool]]:
    return [
        (extent.guest_offset // K, extent.length // K, extent.kind, depth, zero)
        for extent, depth, zero in found
    ]


def two_layers() -> MemoryDisk:
    base = MemoryDisk(64 * K, read_only=True)
    base.fill(0, b"a" * 8 * K)
    base.zero(16 * K, 4 * K)
    top = MemoryDisk(96 * K, backing=base)
    top.fill(4 * K, b"b" * 4 * K)
    top.zero(80 * K, 4 * K)
    return top


def test_below_is_followed_and_a_short_backing_file_ends_in_zeroes() -> None:
    assert summary(chain_extents(two_layers(), 0, 96 * K)) == [
        (0, 4, Kind.DATA, 1, False),
        (4, 4, Kind.DATA, 0, False),
        (8, 8, Kind.BELOW, 1, True),
        (16, 4, Kind.ZERO, 1, True),
        (20, 44, Kind.BELOW, 1, True),
        (64, 16, Kind.BELOW, 0, True),
        (80, 4, Kind.ZERO, 0, True),
        (84, 12, Kind.BELOW, 0, True),
    ]


def test_base_is_not_asked_and_its_bytes_are_not_known_to_be_zero() -> None:
    top = two_layers()
    assert summary(chain_extents(top, 0, 16 * K, base=top.backing)) == [
        (0, 4, Kind.BELOW, 0, False),
        (4, 4, Kind.DATA, 0, False),
        (8, 8, Kind.BELOW, 0, False),
    ]


def test_data_in_a_hole_of_the_file_reads_as_zeroes() -> None:
    file = SparseFile(48 * K)
    file.fill(16 * K, b"x" * 8 * K)
    disk = MemoryDisk(32 * K, file=file, file_offset=12 * K)
    disk.fill(0, bytes(32 * K))
    expected = [
        (0, 4, Kind.DATA, 0, True),
        (4, 8, Kind.DATA, 0, False),
        (12, 20, Kind.DATA, 0, True),
    ]
    assert summary(chain_extents(disk, 0, 32 * K)) == expected
    assert summary(rows(disk)) == expected
    assert summary(chain_extents(disk, 0, 32 * K, look_for_holes=False)) == [
        (0, 32, Kind.DATA, 0, False)
    ]


def rows(node: Node) -> list[Status]:
    """The columns as the values that ``chain_extents`` gives."""
    from lamina.block.extents import Extent

    return [
        Status(
            Extent(
                int(piece.columns.guest_offset[i]),
                int(piece.columns.length[i]),
                Kind(piece.columns.kind[i]),
                piece.columns.nodes[piece.columns.node[i]],
                int(piece.columns.host_offset[i]),
            ),
            int(piece.depth[i]),
            bool(piece.reads_zero[i]),
        )
        for piece in chain_columns(node)
        for i in range(len(piece.depth))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_columns_say_the_same_as_extents(seed: int) -> None:
    chance = random.Random(seed)
    node: MemoryDisk | None = None
    for _ in range(chance.randint(1, 4)):
        size = chance.randint(1, 64) * 4 * K
        file = None
        if chance.random() < 0.5:
            file = SparseFile(size + 12 * K)
            for _ in range(4):
                file.fill(chance.randrange(size // 4 // K) * 4 * K, b"f" * 4 * K)
        node = MemoryDisk(size, backing=node, file=file, file_offset=8 * K)
        node.read_only = False
        for number in range(size // 4 // K):
            kind = chance.choice((Kind.BELOW, Kind.BELOW, Kind.DATA, Kind.ZERO))
            if kind == Kind.DATA:
                node.fill(number * 4 * K, b"d" * 4 * K)
            elif kind == Kind.ZERO:
                node.zero(number * 4 * K, 4 * K)
    assert node is not None
    assert rows(node) == chain_extents(node, 0, node.size)
