"""Power cuts while an image is amended: at worst space leaks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.node import NodeOptions
from lamina.ciphers.luks.amend import Change, amend
from lamina.ciphers.luks.create import first_key, new_header
from lamina.ciphers.luks.header import SIZE as LUKS_SIZE
from lamina.ciphers.luks.header import parse
from lamina.ciphers.luks.volume import unlock
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.options import AmendOptions
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from tests.unit.qcow2.images import make, open_image, read_only, verify

KIB = 1 << 10
SIZE = 48 * KIB
WRITABLE = NodeOptions(read_only=False, unmap=True, filename="memory")
BELOW = b"what lies below " * (SIZE // 16)
LONG = {"backing_file": "b" * 300, "backing_fmt": "raw"}
"""A header of several sectors."""
NAMED = {"backing_file": "below", "backing_fmt": "raw"}


def below(created: dict[str, Any]) -> MemoryFile | None:
    if "backing_file" not in created:
        return None
    return MemoryFile(BELOW, NodeOptions(read_only=True))


def fill(disk: Disk, content: bytearray, rng: random.Random) -> None:
    """Data, compressed clusters and both kinds of zero clusters."""
    unit = disk.mapping.unit
    for cluster in range(SIZE // unit):
        start = cluster * unit
        part = slice(start, start + unit)
        fate = rng.random()
        if fate < 0.3:
            content[part] = rng.randbytes(unit)
            disk.write(start, content[part])
            if fate < 0.1 and disk.mapping.header.version > 2:
                disk.write_zeroes(start, unit)
                content[part] = bytes(unit)
        elif fate < 0.5:
            disk.write_zeroes(start, unit, WriteFlags.MAY_UNMAP)
            content[part] = bytes(unit)
        elif fate < 0.6:
            content[part] = bytes([cluster % 256]) * unit
            disk.write_compressed([(start, memoryview(content[part]))])


def built(created: dict[str, Any], seed: int, snapshots: int) -> tuple[bytes, list[bytes]]:
    """An image, and what its snapshots (the last: its disk) hold."""
    rng = random.Random(seed)
    file = MemoryFile(make(SIZE, **{"cluster_size": 4 * KIB, **created}))
    disk = open_image(file, backing=below(created), node_options=WRITABLE)
    content = bytearray(BELOW if "backing_file" in created else bytes(SIZE))
    states = []
    for number in range(snapshots):
        fill(disk, content, rng)
        states.append(bytes(content))
        DRIVER.create_snapshot(disk, SnapshotInfo("", f"s{number}", 0, 1, 0, 0, 0))
    fill(disk, content, rng)
    states.append(bytes(content))
    disk.close()
    return bytes(file.content), states


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "down": ({}, [{"compat": "0.10"}]),
    "down above a backing file": (NAMED, [{"compat": "0.10"}]),
    "small clusters": ({**NAMED, "cluster_size": 512}, [{"compat": "0.10"}, {"compat": "1.1"}]),
    "up and down": ({**NAMED, "compat": "0.10"}, [{"compat": "1.1"}, {"compat": "0.10"}]),
    "several sectors": ({**LONG, "cluster_size": 8 * KIB}, [{"compat": "0.10"}, {"compat": "1.1"}]),
    "widths": ({}, [{"refcount_bits": 64}, {"refcount_bits": 8}, {"refcount_bits": 4}]),
    "widths of small clusters": (
        {"cluster_size": 512, "refcount_bits": 16},
        [{"refcount_bits": 64}, {"refcount_bits": 8}],
    ),
    "lazy": ({}, [{"lazy_refcounts": True}, {"lazy_refcounts": False}]),
    "all at once": (
        {**NAMED, "refcount_bits": 32, "lazy_refcounts": True},
        [{"refcount_bits": 16, "compat": "0.10"}, {"compat": "1.1", "lazy_refcounts": True}],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("snapshots", [0, 2])
def test_power_cuts(case: str, snapshots: int) -> None:
    created, steps = CASES[case]
    initial, states = built(created, len(case), snapshots)
    kinds: set[tuple[int, int, int]] = set()

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, backing=below(created), node_options=WRITABLE)
        kinds.add(kind_of(disk))
        for step in steps:
            DRIVER.amend(disk, AmendOptions(**step), lambda part: None, force=False)
            kinds.add(kind_of(disk))
        disk.close()

    seen = set()
    for cut in power_cuts(workload, initial=initial, guest_content=states[-1], seed=7):
        look = open_image(read_only(cut.content), backing=below(created))
        seen.add(kind_of(look))
        assert look.read(0, SIZE) == states[-1], cut
        assert look.mapping.header.backing_file == created.get("backing_file"), cut
        for number, state in enumerate(states[:-1]):
            look = open_image(read_only(cut.content), backing=below(created))
            DRIVER.load_snapshot(look, f"s{number}")
            assert look.read(0, SIZE) == state, cut
        errors = verify(cut.content).errors
        # A leaked reference makes a flag too careful.
        assert [one for one in errors if "COPIED=False" not in one] == [], cut
    assert seen >= kinds


def kind_of(disk: Disk) -> tuple[int, int, int]:
    header = disk.mapping.header
    return header.version, header.refcount_bits, header.compatible_features


def test_power_cuts_while_resizing() -> None:
    initial, states = built(NAMED, 1, 0)
    grown, shrunk = 80 * KIB, 32 * KIB

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file, backing=below(NAMED), node_options=WRITABLE)
        for size in (grown, shrunk):
            DRIVER.amend(disk, AmendOptions(size=size), lambda part: None, force=False)
        disk.close()

    sizes = set()
    for cut in power_cuts(workload, initial=initial, guest_content=states[-1]):
        look = open_image(read_only(cut.content), backing=below(NAMED))
        sizes.add(look.size)
        expected = states[-1].ljust(look.size, b"\0")[: look.size]
        assert look.read(0, look.size) == expected, cut
        assert verify(cut.content).errors == [], cut
    assert sizes == {SIZE, grown, shrunk}


def test_a_key_opens_the_volume_at_every_moment() -> None:
    header = new_header(
        cipher_alg="aes-128", cipher_mode="xts", ivgen_alg="plain64", ivgen_hash_alg=None,
        hash_alg="sha1",
    )
    key, material = first_key(header, b"old", 1)
    file = MemoryFile(bytes(header.slots[0].offset))
    file.write(header.slots[0].offset, material)
    file.write(0, header.pack())

    def workload(file: CrashFile, guest: GuestLog) -> None:
        volume = parse(file.read(0, LUKS_SIZE), detached=True)
        amend(volume, file, key, Change("active", b"new", iter_time=1), force=False)
        amend(volume, file, key, Change("inactive", old_passphrase=b"old"), force=False)

    opened = set()
    for cut in power_cuts(workload, initial=bytes(file.content), guest_content=b"", subsets=1):
        if cut.at > 10:
            # Only the material of the erased slot is being overwritten.
            break
        after = MemoryFile(cut.content)
        volume = parse(after.read(0, LUKS_SIZE), detached=True)
        found = set()
        for passphrase in (b"old", b"new"):
            try:
                assert unlock(volume, passphrase, after.read)[0] == key
                found.add(passphrase)
            except LaminaError:
                continue
        assert found, cut
        opened.add(frozenset(found))
    assert {frozenset({b"old"}), frozenset({b"old", b"new"}), frozenset({b"new"})} == opened
