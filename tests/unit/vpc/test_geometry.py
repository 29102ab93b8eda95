"""Sizes and geometries, as QEMU and Virtual PC have them."""

from __future__ import annotations

import pytest

from lamina.errors import UsageError
from lamina.formats.vpc.geometry import LARGEST, disk_size, geometry, rounded_up
from lamina.formats.vpc.layout import DYNAMIC, Footer
from lamina.testing.memory import MemoryFile
from tests.unit.vpc.images import make, open_image

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("size", "made", "chs"),
    [
        (0, 0, (0, 0, 0)),
        (1 * MIB, 1079296, (31, 4, 17)),
        (3 * MIB, 3168256, (91, 4, 17)),
        (10 * MIB, 10514432, (302, 4, 17)),
        (100 * MIB, 104865792, (1004, 12, 17)),
        (504 * MIB, 528482304, (1024, 16, 63)),
        (1 * GIB, 1073995776, (2081, 16, 63)),
        (8 * GIB, 8590417920, (16645, 16, 63)),
        (32 * GIB, 34361303040, (16449, 16, 255)),
        (127 * GIB, 136365219840, (65279, 16, 255)),
        (128 * GIB, 128 * GIB, LARGEST),
        (2040 * GIB, 2040 * GIB, LARGEST),
    ],
)
def test_rounding(size: int, made: int, chs: tuple[int, int, int]) -> None:
    sectors, found = rounded_up(size // 512)
    assert (sectors * 512, found) == (made, chs)
    if size and chs != LARGEST:
        assert geometry(sectors) == chs


@pytest.mark.parametrize(
    ("creator", "mode", "by_geometry"),
    [
        (b"vpc ", None, True),
        (b"qemu", None, True),
        (b"qem2", None, False),
        (b"win ", None, False),
        (b"d2v\0", None, False),
        (b"tap\0", None, False),
        (b"CTXS", None, False),
        (b"wa\0\0", None, False),
        (b"win ", "chs", True),
        (b"vpc ", "current_size", False),
    ],
)
def test_which_size_is_trusted(creator: bytes, mode: str | None, by_geometry: bool) -> None:
    footer = Footer(10 * MIB, DYNAMIC, (301, 4, 17), creator=creator)
    assert disk_size(footer, mode) == (301 * 4 * 17 * 512 if by_geometry else 10 * MIB)
    largest = Footer(10 * MIB, DYNAMIC, LARGEST, creator=creator)
    assert disk_size(largest, mode) == 10 * MIB


def test_unknown_mode() -> None:
    with pytest.raises(UsageError, match="Invalid size calculation mode: 'foo'"):
        open_image(MemoryFile(make(4096)), mode="foo")
