"""What is found wrong with an image, in QEMU's words, and how it is put right."""

from __future__ import annotations

import struct

import pytest

from lamina.block.driver import Fix
from lamina.errors import ImageCorrupt
from lamina.formats.parallels import survey as survey_module
from lamina.testing.memory import MemoryFile
from tests.unit.parallels.images import ALL, empty_image, open_image, table, verify

SIZE = 16 << 10
LEAKS = Fix(leaks=True)


def image(**options) -> bytes:
    file = MemoryFile(empty_image(SIZE, **options))
    disk = open_image(file)
    for block, mark in ((0, b"a"), (2, b"b"), (4, b"c"), (5, b"d")):
        disk.write(block * 1024, mark * 1024)
    disk.close()
    return bytes(file.content)


def changed(content: bytes, offset: int, *numbers: int) -> bytes:
    data = struct.pack(f"<{len(numbers)}I", *numbers)
    return content[:offset] + data + content[offset + len(data) :]


def read(content: bytes) -> bytes:
    return open_image(MemoryFile(content)).read(0, SIZE)


BASE = image()
DISK = read(BASE)


def test_a_sound_image():
    result, lines, after = verify(BASE, ALL)
    assert (lines, after) == ([], BASE)
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (
        16,
        4,
        0,
    )
    assert result.image_end_offset == len(BASE)


def test_unclean():
    content = changed(BASE, 44, 0x746F6E59)
    assert verify(content)[1] == ["ERROR image was not closed correctly"]
    result, lines, after = verify(content, LEAKS)
    assert (result.corruptions, lines, after) == (
        1,
        ["ERROR image was not closed correctly"],
        content,
    )
    result, lines, after = verify(content, ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert lines == ["Repairing image was not closed correctly"]
    assert verify(after)[1] == []


@pytest.mark.parametrize("more", [1, 1024, 3000])
def test_leaks(more):
    content = BASE + bytes(more)
    result, lines, _ = verify(content)
    assert (result.leaks, result.corruptions) == (-(-more // 1024), 0)
    assert lines == [f"ERROR space leaked at the end of the image {more}"]
    result, lines, after = verify(content, LEAKS)
    assert (result.leaks, result.leaks_fixed) == (0, -(-more // 1024))
    assert lines == [f"Repairing space leaked at the end of the image {more}"]
    assert after == BASE


@pytest.mark.parametrize("entry", [100, 0xFFFFFFFF])
def test_outside(entry):
    content = changed(BASE, 64, entry)
    assert verify(content)[1] == ["ERROR cluster 0 is outside image"]
    assert verify(content, LEAKS)[2] == content
    with pytest.raises(ImageCorrupt, match="cluster 0 is outside image"):
        open_image(MemoryFile(content), check=True).read(0, 512)
    result, lines, after = verify(content, ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert lines == ["Repairing cluster 0 is outside image"]
    assert read(after) == bytes(1024) + DISK[1024:]


def test_within_the_table():
    """An entry that names the table itself is no place for data."""
    content = changed(image(by_cluster=False), 68, 0)
    content = changed(content, 64, 0x7FFFFFFF)
    assert verify(content)[1] == ["ERROR cluster 0 is outside image"]


def test_half_outside():
    content = BASE[:-512]
    assert verify(content)[1] == ["ERROR cluster 5 is outside image"]
    # Half of a cluster is not cut off as if it were nothing.
    assert verify(content, LEAKS)[2] == content
    result, lines, after = verify(content, ALL)
    assert lines == [
        "Repairing cluster 5 is outside image",
        "Repairing space leaked at the end of the image 512",
    ]
    assert (result.corruptions_fixed, result.leaks_fixed) == (1, 1)
    assert read(after) == DISK[: 5 * 1024] + bytes(11 * 1024)


@pytest.mark.parametrize("many", [False, True])
def test_duplicates(many, monkeypatch):
    if many:
        monkeypatch.setattr(survey_module, "MANY", 1)
    content = changed(BASE, 68, 1)
    result, lines, _ = verify(content)
    assert (result.corruptions, result.allocated_clusters, result.fragmented_clusters) == (1, 5, 1)
    assert lines == ["ERROR duplicate offset in BAT entry 1"]
    result, lines, after = verify(content, ALL)
    assert lines == ["Repairing duplicate offset in BAT entry 1"]
    assert table(after)[:6] == [1, 5, 2, 0, 3, 4]
    assert verify(after)[1] == []
    assert read(after) == DISK[:1024] * 2 + DISK[2048:]


@pytest.mark.parametrize("many", [False, True])
def test_three_of_a_kind_and_a_hole(many, monkeypatch):
    if many:
        monkeypatch.setattr(survey_module, "MANY", 1)
    content = changed(BASE, 68, 1, 1)
    result, _, after = verify(content, ALL)
    assert result.corruptions_fixed == 2
    assert table(after)[:6] == [1, 2, 5, 0, 3, 4]
    assert read(after) == DISK[:1024] * 3 + DISK[3072:]


@pytest.mark.parametrize("many", [False, True])
def test_clusters_that_overlap_in_part(many, monkeypatch):
    if many:
        monkeypatch.setattr(survey_module, "MANY", 1)
    base = image(by_cluster=False)
    first = table(base)[0]
    content = changed(base, 68, first + 1)
    before = open_image(MemoryFile(content), check=True).read(0, SIZE)
    assert verify(content)[1] == ["ERROR duplicate offset in BAT entry 1"]
    _, _, after = verify(content, ALL)
    assert verify(after)[1] == []
    assert read(after) == before


@pytest.mark.parametrize("start", [0, 1, 0x7FFFFFFF, 4])
def test_data_start(start):
    content = changed(BASE, 48, start)
    assert verify(content)[1] == ["ERROR data_off field has incorrect value"]
    assert verify(content, LEAKS)[2] == content
    assert verify(content, ALL)[2] == BASE


def test_opening_for_writing_repairs():
    content = changed(changed(BASE + bytes(1024), 44, 0x746F6E59), 68, 1)
    file = MemoryFile(content)
    disk = open_image(file)
    assert disk.context.warnings == [
        "Repairing image was not closed correctly",
        "Repairing space leaked at the end of the image 1024",
        "Repairing duplicate offset in BAT entry 1",
    ]
    disk.write(1024, b"z" * 1024)
    disk.close()
    assert verify(bytes(file.content))[1] == []
    assert read(bytes(file.content)) == DISK[:1024] + b"z" * 1024 + DISK[2048:]


def test_the_two_surveys_agree(monkeypatch):
    import random

    from lamina.engine.blocktable import BlockTable
    from lamina.engine.metadata import Metadata
    from lamina.formats.parallels.layout import Header

    rng = random.Random(1)
    for _ in range(300):
        by_cluster = rng.random() < 0.6
        entries = rng.randrange(1, 30)
        numbers = [
            rng.choice((0, rng.randrange(40), rng.randrange(40), 1 << 31)) for _ in range(entries)
        ]
        header = Header(3, entries, entries * 3, 3, by_cluster)
        file = MemoryFile(header.pack() + struct.pack(f"<{entries}I", *numbers))
        bat = BlockTable(Metadata(file), host_offset=64, entries=entries)
        found = []
        for many in (1, 1000):
            monkeypatch.setattr(survey_module, "MANY", many)
            found.append(survey_module.survey(bat, header, 30_000))
        assert found[0] == found[1]
