"""Logs: entries, the sequence that counts, and the two ways of carrying it out."""

from __future__ import annotations

import random
import struct

import pytest

from lamina.engine.metadata import DirtyWrite
from lamina.errors import ImageCorrupt, LaminaError, StorageError
from lamina.formats.vhdx.headers import Headers
from lamina.formats.vhdx.layout import NO_GUID, new_guid
from lamina.formats.vhdx.log import Change, Log, pack_entry, parse_entry, parse_entry_header
from lamina.formats.vhdx.replay import Pending, ReplayedFile
from lamina.records import replace
from lamina.testing.memory import MemoryFile
from lamina.units import GIB, MIB
from tests.unit.vhdx.images import READ_ONLY, logged, make, open_image

SIZE = 4 * GIB
IMAGE = make(SIZE)


def entry(changes, **fields) -> bytes:
    given = {
        "sequence": 5,
        "tail": 0,
        "guid": bytes(range(16)),
        "flushed_size": 8 * MIB,
        "last_size": 8 * MIB,
        **fields,
    }
    return pack_entry(changes, **given)


def test_entries_round_trip():
    rng = random.Random(1)
    for count in (0, 1, 5, 126, 127, 300):
        changes = [
            Change(n * 4096, 4096, rng.randbytes(4096)) if rng.random() < 0.8
            else Change(n * 4096, 8192, None)
            for n in range(count)
        ]
        packed = entry(changes, sequence=(1 << 40) + count, tail=8192)
        assert len(packed) % 4096 == 0
        assert parse_entry(packed) == changes
        header = parse_entry_header(packed)
        assert (header.sequence, header.tail) == ((1 << 40) + count, 8192)
        assert header.descriptors == count
        assert (header.flushed_size, header.last_size) == (8 * MIB, 8 * MIB)


def test_an_entry_with_any_byte_changed_is_not_valid():
    packed = entry([Change(0, 4096, b"x" * 4096), Change(4096, 4096, None)])
    rng = random.Random(2)
    for _ in range(300):
        torn = bytearray(packed)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        assert parse_entry(bytes(torn)) is None
    assert parse_entry(packed[:4096]) is None


def pending(entries) -> Pending:
    file = MemoryFile(logged(IMAGE, entries))
    return Pending(file, Headers(file).current)


@pytest.mark.parametrize(
    ("entries", "active"),
    [
        ([], []),
        ([(0, 1, 0)], [1]),
        ([(40960, 9, 40960)], [9]),
        # One behind the other; the tail says where to begin.
        ([(0, 1, 0), (12288, 2, 0), (24576, 3, 0)], [1, 2, 3]),
        ([(0, 1, 0), (12288, 2, 0), (24576, 3, 12288)], [2, 3]),
        ([(0, 1, 0), (12288, 2, 0), (24576, 3, 24576)], [3]),
        # Over the end of the ring, between entries and within one.
        ([(MIB - 12288, 1, MIB - 12288), (0, 2, MIB - 12288)], [1, 2]),
        ([(MIB - 4096, 1, MIB - 4096), (8192, 2, MIB - 4096)], [1, 2]),
        # The sequence that ends with the highest number counts.
        ([(0, 8, 0), (40960, 3, 40960)], [8]),
        ([(0, 3, 0), (12288, 4, 0), (40960, 9, 40960)], [9]),
        # Its tail has been overwritten: not a sequence any more.
        ([(0, 1, 0), (40960, 7, 20480)], [1]),
        # Numbers must follow each other, and so must places.
        ([(0, 1, 0), (12288, 3, 12288)], [3]),
        ([(0, 1, 0), (12288, 2, 0), (28672, 3, 0)], [1, 2]),
    ],
)
def test_the_active_sequence(entries, active):
    assert [one.header.sequence for one in pending(entries).entries] == active


def test_entries_of_another_log_do_not_count():
    file = MemoryFile(logged(IMAGE, [(0, 1, 0)]))
    Headers(file).update(log_guid=new_guid())
    assert Pending(file, Headers(file).current).entries == []


def test_torn_entries_end_a_sequence():
    file = MemoryFile(logged(IMAGE, [(0, 1, 0), (12288, 2, 0), (24576, 3, 0)]))
    file.content[MIB + 24576 + 5000] ^= 1
    assert [one.header.sequence for one in Pending(file, Headers(file).current).entries] == [1, 2]


def test_a_file_that_was_cut_is_refused():
    file = MemoryFile(logged(IMAGE, [(0, 1, 0)]))
    file.truncate(7 * MIB)
    with pytest.raises(ImageCorrupt, match="has been truncated"):
        Pending(file, Headers(file).current)


def test_both_ways_of_carrying_out_agree():
    rng = random.Random(3)
    for _ in range(40):
        file = MemoryFile(rng.randbytes(64) * (4 * MIB // 64))
        header = Headers(MemoryFile(IMAGE)).current
        at, tail, guid = 0, 0, new_guid()
        for sequence in range(1, rng.randrange(2, 6)):
            changes = []
            for _ in range(rng.randrange(5)):
                offset = (512 + rng.randrange(60)) * 4096
                data = rng.choice([None, rng.randbytes(4096)])
                length = 4096 if data else 4096 * rng.randrange(9)
                changes.append(Change(offset, length, data))
            packed = entry(
                changes,
                sequence=sequence,
                guid=guid,
                tail=tail,
                flushed_size=4 * MIB,
                last_size=5 * MIB,
            )
            file.write(MIB + at, packed)
            at += len(packed)
        header = replace(header, log_guid=guid)
        in_memory = ReplayedFile(file, Pending(file, header))
        found = in_memory.read(0, in_memory.size)
        pieces = b"".join(
            in_memory.read(start, min(1000, in_memory.size - start))
            for start in range(0, in_memory.size, 1000)
        )
        assert found == pieces
        Pending(file, header).carry_out()
        assert file.content == found
        Pending(file, header).carry_out()
        assert file.content == found, "twice does no harm"


@pytest.mark.parametrize(
    ("change", "last"),
    [
        (Change(64 << 10, 4096, bytes(4096)), 8 * MIB),
        (Change(0, 4096, bytes(4096)), 8 * MIB),
        (Change(MIB + 8192, 4096, bytes(4096)), 8 * MIB),
        (Change(2 * MIB + 512, 4096, bytes(4096)), 8 * MIB),
        (Change(2 * MIB, 1000, None), 8 * MIB),
        (Change(2 * MIB, 1 << 62, None), 8 * MIB),
        (Change(8 * MIB, 4096, bytes(4096)), 8 * MIB),
        (Change(2 * MIB, 4096, None), 1 << 62),
    ],
)
def test_changes_of_what_no_log_may_change(change, last):
    file = MemoryFile(IMAGE)
    headers = Headers(file)
    headers.update(log_guid=bytes(range(16)))
    file.write(MIB, entry([Change(2 * MIB, 4096, b"x" * 4096), change], last_size=last))
    before = bytes(file.content)
    for options in ({}, {"node_options": READ_ONLY}):
        with pytest.raises(LaminaError):
            open_image(file, **options)
        assert file.content == before, "nothing is changed in vain"


def test_region_tables_may_be_logged():
    file = MemoryFile(IMAGE)
    Headers(file).update(log_guid=bytes(range(16)))
    table = bytes(file.content[192 << 10 : (192 << 10) + 4096])
    file.write(192 << 10, bytes(64 << 10))
    file.write(MIB, entry([Change(192 << 10, 4096, table)]))
    with open_image(file) as disk:
        assert disk.mapping.image.good_tables == (True, True)


def test_opening_for_writing_carries_out_and_empties_the_log():
    content = logged(IMAGE, [(0, 1, 0), (12288, 2, 0)])
    file = MemoryFile(content)
    with open_image(file, node_options=READ_ONLY) as disk:
        assert disk.mapping.image.replayed
        seen = [disk.mapping.bat.get(block) for block in range(0, 4096, 512)]
    assert file.content == content
    old = Headers(file).current
    with open_image(file) as disk:
        assert [disk.mapping.bat.get(block) for block in range(0, 4096, 512)] == seen
    new = Headers(file).current
    assert new.log_guid == NO_GUID
    assert new.file_write_guid != old.file_write_guid
    assert new.data_write_guid == old.data_write_guid, "the guest sees what it saw"
    with open_image(file, node_options=READ_ONLY) as disk:
        assert not disk.mapping.image.replayed


def test_an_image_opened_read_only_is_reopened_for_writing():
    file = MemoryFile(logged(IMAGE, [(0, 1, 0)]))
    disk = open_image(file, node_options=READ_ONLY)
    expected = [disk.mapping.bat.get(block) for block in range(4096)]
    disk.reopen(read_only=False)
    assert Headers(file).current.log_guid == NO_GUID
    assert [disk.mapping.bat.get(block) for block in range(4096)] == expected
    disk.write(3 * MIB, b"hello")
    disk.close()
    with open_image(file) as disk:
        assert disk.read(3 * MIB, 5) == b"hello"


def test_guids_change_with_the_first_write_only():
    file = MemoryFile(IMAGE)
    old = Headers(file).current
    with open_image(file) as disk:
        disk.read(0, 4096)
        disk.flush()
    assert file.content == IMAGE, "nothing was written, so nothing has changed"
    with open_image(file) as disk:
        disk.write(0, b"x")
        first = Headers(file).current
        assert first.log_guid != NO_GUID
        disk.write(MIB, b"x")
        disk.flush()
        assert Headers(file).current == first
    last = Headers(file).current
    assert last.log_guid == NO_GUID
    assert (last.file_write_guid, last.data_write_guid) == (
        first.file_write_guid,
        first.data_write_guid,
    )
    assert first.file_write_guid != old.file_write_guid
    assert first.data_write_guid != old.data_write_guid
    assert last.sequence == old.sequence + 4


def test_many_changes_are_logged_in_several_entries():
    file = MemoryFile(make(MIB))
    headers = Headers(file)
    headers.update(log_guid=new_guid())
    log = Log(file, headers)
    writes = [
        DirtyWrite(2 * MIB, bytes(100 * 4096), ""),
        DirtyWrite(3 * MIB, memoryview(b"x" * 80 * 4096), ""),
    ]
    groups = list(log.groups(writes))
    assert [sum(len(one.data) for one in group) // 4096 for group in groups] == [126, 54]
    for number, group in enumerate(groups, 1):
        log.append(group)
        header = parse_entry_header(file.read(MIB, 4096))
        assert (header.sequence, header.tail) == (number, 0)
        changes = parse_entry(file.read(MIB, header.length))
        assert [(one.offset, one.data) for one in changes] == [
            (offset + skip, bytes(data[skip : skip + 4096]))
            for offset, data, *_ in group
            for skip in range(0, len(data), 4096)
        ]
    with pytest.raises(ValueError, match="whole sectors"):
        list(log.groups([DirtyWrite(2 * MIB + 8, b"x" * 8, "")]))


def test_numbers_of_descriptors_that_do_not_fit():
    packed = bytearray(entry([Change(0, 4096, None)]))
    packed[24:28] = struct.pack("<I", 0xFFFFFFFF)
    assert parse_entry_header(packed) is None


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_log_that_could_not_be_closed_goes_on(kind, number):
    """The headers may or may not say that it is empty: they are written anew before it is used."""
    file = MemoryFile(IMAGE)
    disk = open_image(file)
    disk.write(0, b"a" * 100)
    disk.flush()
    left = [number]

    def hook(what: str, offset: int, length: int) -> None:
        if what == kind:
            left[0] -= 1
            if not left[0]:
                raise StorageError.from_errno(5)

    file.hook = hook
    with pytest.raises(StorageError):
        disk.mapping.end_log()
    file.hook = None
    assert not disk.mapping.headers.certain
    disk.write(2 * MIB, b"b" * 100)
    disk.mapping.metadata.commit()
    seen = [one.header.guid for one in Pending(file, Headers(file).current).entries]
    assert seen == [disk.mapping.headers.current.log_guid]
    disk.close()
    with open_image(file) as again:
        assert again.read(2 * MIB, 100) == b"b" * 100
