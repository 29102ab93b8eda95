"""Fuzzing VHDX: structures as bytes, and whole images opened, read, written, checked, repaired."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

from lamina.block.driver import Fix
from lamina.errors import LaminaError
from lamina.formats.vhdx import layout, locator, metadata
from lamina.formats.vhdx.check import check
from lamina.formats.vhdx.log import Change, pack_entry, parse_entry
from lamina.testing.memory import MemoryFile
from lamina.units import KIB, MIB
from tests.fuzz.mutation import mutate
from tests.unit.vhdx.images import READ_ONLY, filled, logged, make, open_image

SIZE = 5 * MIB
LONGEST = 64 * MIB
"""Bytes: nothing that is done to a small image makes it grow beyond."""
_BAT, _METADATA = 2 * MIB, 3 * MIB


def _structures() -> list[tuple[Callable[[bytes], object], bytes, int]]:
    """(parser, valid bytes, where the interesting ones end)."""
    guid = layout.new_guid()
    header = layout.Header(5, guid, guid, guid, MIB, MIB).pack()
    regions = layout.pack_regions(
        [
            layout.Region(layout.BAT_REGION, 2 * MIB, MIB),
            layout.Region(layout.METADATA_REGION, 3 * MIB, MIB),
        ]
    )
    content = {name: data for name, _, data in metadata.Parameters(SIZE, MIB).pack()}
    table = metadata.pack_items(
        [metadata.Item(name, 64 * KIB, len(data), 6) for name, data in content.items()]
    ).ljust(64 * KIB, b"\0")
    items = b"".join(content.values())
    entry = pack_entry(
        [Change(2 * MIB, 4096, bytes(range(256)) * 16), Change(3 * MIB, 8192, None)],
        sequence=7,
        tail=0,
        guid=guid,
        flushed_size=MIB,
        last_size=MIB,
    )

    def parse_items(data: bytes) -> object:
        found, at = {}, 0
        for name, length in metadata.ITEM_LENGTHS.items():
            found[name] = data[at : at + length]
            at += length
        return metadata.parse_parameters(found)

    return [
        (lambda data: layout.parse_header(layout.with_checksum(data)), header, 80),
        (lambda data: layout.parse_regions(layout.with_checksum(data)), regions, 80),
        (lambda data: metadata.parse_items(data, MIB), table, 200),
        (parse_items, items, len(items)),
        (
            lambda data: parse_entry(layout.with_checksum(data)),
            entry,
            128,
        ),
        (
            lambda data: locator.filenames(locator.parse(data)),
            locator.pack(locator.for_parent("base.vhdx", guid)),
            120,
        ),
    ]


def fuzz_structures(count: int, seed: int = 0) -> int:
    """Parse ``count`` mutated structures; how many were accepted. Raises what is no error of ours.
    """
    rng = random.Random(seed)
    kinds = _structures()
    accepted = 0
    for number in range(count):
        parse, data, end = kinds[number % len(kinds)]
        changed = bytes(mutate(rng, data, [(0, end)]))
        with suppress(LaminaError):
            accepted += parse(changed) is not None
    return accepted


def _images() -> list[tuple[bytes, bytes | None]]:
    """(image, parent), with blocks of every kind, and with a log."""
    plain = filled(make(SIZE), b"data" * 1000)
    parent = filled(make(SIZE), b"p" * 3 * MIB)
    file = MemoryFile(make(SIZE, parent=parent))
    with open_image(file, parent=parent) as disk:
        disk.write(100, b"x" * 3000)
        disk.write(2 * MIB, b"y" * MIB)
        disk.write_zeroes(MIB, MIB)
    return [
        (plain, None),
        (bytes(file.content), parent),
        (logged(plain, [(0, 1, 0), (12288, 2, 0)]), None),
    ]


_SPANS = [
    *((start, start + 80) for start in (64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB)),
    *((start, start + 128) for start in (MIB, MIB + 12288)),
    *((start, start + 48) for start in (_BAT, _BAT, _BAT, _BAT, _METADATA + 64 * KIB)),
    (_METADATA, _METADATA + 240),
    (_METADATA + 64 * KIB, _METADATA + 64 * KIB + 300),
]


def fuzz_images(count: int, seed: int = 0) -> dict[str, int]:
    """Put ``count`` mutated images through everything; how many came how far."""
    rng = random.Random(seed)
    images = _images()
    reached = {"opened": 0, "read": 0, "clean": 0}
    for number in range(count):
        image, parent = images[number % len(images)]
        changed = bytearray(image)
        # One stretch at a time: the image is long, what matters of it is not.
        for _ in range(rng.randrange(1, 4)):
            start, end = rng.choice(_SPANS)
            changed[start:end] = mutate(rng, bytes(changed[start:end]), [(0, end - start)]).ljust(
                end - start, b"\0"
            )
        if rng.random() < 0.8:
            for start in layout.HEADER_OFFSETS:
                end = start + 4 * KIB
                changed[start:end] = layout.with_checksum(bytes(changed[start:end]))
            for start in layout.REGION_TABLE_OFFSETS:
                end = start + 64 * KIB
                changed[start:end] = layout.with_checksum(bytes(changed[start:end]))
        if rng.random() < 0.05:
            del changed[rng.randrange(len(changed)) :]
        _exercise(bytes(changed), parent, reached)
    return reached


def _exercise(image: bytes, parent: bytes | None, reached: dict[str, int]) -> None:
    file = MemoryFile(image)
    with suppress(LaminaError), open_image(file, parent=parent, node_options=READ_ONLY) as disk:
        reached["opened"] += 1
        disk.info()
        disk.extents(0, min(disk.size, SIZE))
        disk.read(0, min(disk.size, SIZE))
        reached["read"] += 1
    assert file.content == image
    with suppress(LaminaError), open_image(file, parent=parent) as disk:
        disk.write(MIB - 100, b"x" * 200)
    assert len(file.content) < LONGEST
    file = MemoryFile(image)
    with suppress(LaminaError), open_image(file, parent=parent, check=True) as disk:
        check(disk.mapping, Fix(), lambda line: None)
        check(disk.mapping, Fix(errors=True), lambda line: None)
        again = check(disk.mapping, Fix(errors=True), lambda line: None)
        assert len(file.content) < LONGEST
        if again.corruptions or again.corruptions_fixed:
            return
        reached["clean"] += 1
        # It is sound now: it reads, takes writes, and stays sound.
        disk.read(0, min(disk.size, SIZE))
        disk.write(min(disk.size // 2, MIB), b"y")
        disk.flush()
        assert check(disk.mapping, Fix(), lambda line: None).corruptions == 0
