"""Sizes as qemu-img measure tells them (10.0.2)."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.errors import UsageError
from lamina.formats.qcow2.measure import measure
from lamina.formats.qcow2.options import CreateOptions
from lamina.testing.memory import MemoryFile
from lamina.units import parse_size
from tests.unit.qcow2.images import open_image
from tests.unit.qcow2_check.damage import UNIT, sound

SIZES = [
    ("0", {}, 196608, 196608),
    ("512", {}, 327680, 393216),
    ("1000", {}, 327680, 393216),
    ("1G", {}, 393216, 1074135040),
    ("10G", {}, 1900544, 10739318784),
    ("64T", {}, 10739253248, 70379483430912),
    ("1G", {"preallocation": "metadata"}, 393216, 1074135040),
    ("1G", {"preallocation": "falloc"}, 1074135040, 1074135040),
    ("1G", {"preallocation": "full"}, 1074135040, 1074135040),
    ("1G", {"extended_l2": True}, 524288, 1074266112),
    ("1G", {"backing_file": "x"}, 393216, 1074135040),
    ("77G", {"cluster_size": 512, "refcount_bits": 1}, 1332862464, 84010982912),
    ("77G", {"cluster_size": 512, "refcount_bits": 64}, 2666375680, 85344496128),
    ("3T", {"cluster_size": 4096, "refcount_bits": 16}, 8072749056, 3306607632384),
    ("3T", {"cluster_size": 2 << 20, "refcount_bits": 64}, 33554432, 3298568437760),
]


@pytest.mark.parametrize(("size", "options", "required", "full"), SIZES)
def test_empty(size: str, options: dict[str, Any], required: int, full: int) -> None:
    found = measure(CreateOptions(size=parse_size(size), **options), None)
    assert (found.required, found.fully_allocated, found.bitmaps) == (required, full, None)


WRONG = [
    ({"cluster_size": 3}, "Cluster size must be a power of two between 512 and 2048k"),
    ({"refcount_bits": 3}, "Refcount width must be a power of two and may not exceed 64 bits"),
    (
        {"refcount_bits": 1, "compat": "0.10"},
        "Different refcount widths than 16 bits require compatibility level 1.1 or above "
        "(use compat=1.1 or greater)",
    ),
    ({"compat": "foo"}, "Invalid compatibility level: 'foo'"),
    ({"preallocation": "foo"}, "invalid parameter value: foo"),
    ({"encrypt_format": "luks"}, "Parameter 'encrypt.key-secret' is required for cipher"),
    (
        {"extended_l2": True, "cluster_size": 4096},
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
    ),
    (
        {"cluster_size": 512, "size": 3 << 40},
        "The image size is too large (try using a larger cluster size)",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        measure(CreateOptions(**{"size": 1 << 30, **options}), None)
    assert str(caught.value) == message


def test_what_a_source_holds() -> None:
    source = open_image(MemoryFile(sound()))
    # Four data clusters and a compressed one, in the first cluster of the new image.
    found = measure(CreateOptions(), source)
    assert found.required == 327680 + 65536
    assert found.bitmaps == 0
    assert measure(CreateOptions(cluster_size=UNIT), source).required == (5 + 5) * UNIT
    assert measure(CreateOptions(compat="0.10"), source).bitmaps is None
    assert measure(CreateOptions(backing_file="x"), source).required == found.fully_allocated


def test_columns_and_extents_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_image(MemoryFile(sound()))
    for unit in (512, 1024, UNIT, 65536):
        options = CreateOptions(cluster_size=unit)
        monkeypatch.setattr("lamina.block.occupancy._MANY", 0)
        by_columns = measure(options, source)
        monkeypatch.setattr("lamina.block.occupancy._MANY", 1 << 30)
        assert measure(options, source) == by_columns
