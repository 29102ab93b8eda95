"""VMDKs with the power cut at every write: what was flushed is there, nothing shows what belongs
elsewhere, and a check repairs what is left."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from lamina.block.driver import Fix
from lamina.block.node import Node, NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import LaminaError
from lamina.formats.vmdk import DRIVER
from lamina.formats.vmdk.descriptor import ExtentLine, parse_bytes
from lamina.formats.vmdk.layout import parse_footer
from lamina.testing.crash import CrashFile, GuestLog, power_cuts_of_files
from lamina.testing.memory import MemoryFile
from tests.unit.vmdk.images import (
    GRAIN,
    WRITABLE,
    monolithic,
    open_image,
    parent_cid_of,
    sparse_extent,
    split,
    stream,
)

SIZE = 24 * GRAIN
BELOW = random.Random(1).randbytes(SIZE)
PARENT_CID = 0xBADCAFE
READABLE = NodeOptions(read_only=True, filename="below")


def parent() -> Disk:
    text = split("monolithicFlat", [ExtentLine("RW", SIZE, "FLAT", "f")])
    text = parse_bytes(text).with_cid(PARENT_CID).encoded()
    file, data = MemoryFile(text, READABLE), MemoryFile(BELOW, READABLE)
    return open_image(file, data, options=READABLE)


def sparse(*, backed: bool, **layout: object) -> list[bytes]:
    return [monolithic(SIZE, parent_cid=PARENT_CID if backed else None, **layout)]


def in_two_files(*, backed: bool) -> list[bytes]:
    lengths = (9 * GRAIN, 15 * GRAIN)
    lines = [ExtentLine("RW", length, "SPARSE", f"e{length}") for length in lengths]
    text = split("twoGbMaxExtentSparse", lines, PARENT_CID if backed else None)
    return [text, *(sparse_extent(length, zeroed=True, tables=False) for length in lengths)]


def reopened(contents: Sequence[bytes], backing: Disk | None) -> Disk:
    return open_image(*(MemoryFile(content) for content in contents), backing=backing)


def random_work(seed: int, operations: int, backed: bool) -> Callable[..., None]:
    def workload(files: list[CrashFile], guest: GuestLog) -> None:
        rng = random.Random(seed)
        disk = open_image(*files, backing=parent() if backed else None, options=WRITABLE)
        units = SIZE // GRAIN
        for _ in range(operations):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice([1, 100, GRAIN, 3 * GRAIN]), SIZE - offset)
            start = rng.randrange(units) * GRAIN
            action = rng.randrange(11)
            if action < 5:
                guest.write(disk, offset, rng.randbytes(length))
            elif action == 5:
                some = rng.sample(range(units), 3)
                guest.writev(disk, [(n * GRAIN + 7, rng.randbytes(300)) for n in some])
            elif action == 6:
                guest.write_zeroes(disk, offset, length)
            elif action == 7:
                guest.discard(disk, start, min(2 * GRAIN, SIZE - start))
            elif action < 10:
                guest.flush(disk)
            else:
                disk.metadata.commit()
        disk.close()

    return workload


CASES: list[tuple[Callable[[bool], list[bytes]], bool]] = [
    (lambda backed: sparse(backed=backed), False),
    (lambda backed: sparse(backed=backed, zeroed=True, tables=False), True),
    (lambda backed: in_two_files(backed=backed), False),
    (lambda backed: in_two_files(backed=backed), True),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_power_cuts(number: int) -> None:
    make, backed = CASES[number]
    cuts = 0
    for cut in power_cuts_of_files(
        random_work(number, 30, backed),
        initial=make(backed),
        guest_content=BELOW if backed else bytes(SIZE),
        seed=number,
        subsets=1,
    ):
        disk = reopened(cut.contents, parent() if backed else None)
        cut.verify(disk.read(0, SIZE))
        lines: list[str] = []
        DRIVER.check(disk, Fix(leaks=True, errors=True), lines.append)
        again = DRIVER.check(disk, Fix(), lines.append)
        assert not again.corruptions, lines
        assert not again.check_errors, lines
        cut.verify(disk.read(0, SIZE))
        # It goes on, and what is written leaves the rest alone.
        expected = bytearray(disk.read(0, SIZE))
        expected[GRAIN + 100 : GRAIN + 113] = b"after the cut"
        disk.write(GRAIN + 100, b"after the cut")
        assert disk.read(0, SIZE) == expected
        disk.close()
        cuts += 1
    assert cuts > 60


def test_streams() -> None:
    """Grains of a stream are written once; every state opens, and a closed one has its footer."""

    def workload(files: list[CrashFile], guest: GuestLog) -> None:
        rng = random.Random(3)
        for first, last in ((0, 9), (9, 14), (14, 24)):
            disk = open_image(*files, options=WRITABLE)
            for number in range(first, last):
                guest.write(disk, number * GRAIN, rng.randbytes(64) * (GRAIN // 64))
                if number % 3 == 2:
                    guest.flush(disk)
            guest.flush(disk)
            disk.close()
            parse_footer(bytes(files[0].content)[-1536:])

    # Tables of 128 entries: grains of one sector need several of them.
    for grain in (GRAIN, 512):
        for cut in power_cuts_of_files(
            workload if grain == GRAIN else _small_grains,
            initial=[stream(SIZE, grain=grain)],
            guest_content=bytes(SIZE),
        ):
            disk = reopened(cut.contents, None)
            cut.verify(disk.read(0, SIZE))
            lines: list[str] = []
            assert not DRIVER.check(disk, Fix(), lines.append).corruptions, lines
            free = cut.guest.content.rfind(bytes(grain)) // grain * grain
            if free >= 0 and not any(disk.read(free, grain)):
                written = _writes(disk, free, b"z" * grain)
                assert not written or disk.read(free, grain) == b"z" * grain
            disk.close()


def _writes(disk: Node, offset: int, data: bytes) -> bool:
    """A grain of zeroes may have been written, too."""
    try:
        disk.write(offset, data)
    except LaminaError:
        return False
    return True


def _small_grains(files: list[CrashFile], guest: GuestLog) -> None:
    rng = random.Random(4)
    disk = open_image(*files, options=WRITABLE)
    for number in (0, 1, 150, 20, 170, 21, 5):
        guest.write(disk, number * 512, rng.randbytes(512))
        if number in (1, 20):
            guest.flush(disk)
    disk.close()


def test_an_overlay_keeps_its_parent() -> None:
    """A parent's identifier changes before its content does."""
    base = parent()
    assert parent_cid_of(base) == PARENT_CID

    def workload(files: list[CrashFile], guest: GuestLog) -> None:
        disk = open_image(*files, options=WRITABLE)
        guest.write(disk, 5, b"changed")
        guest.flush(disk)
        disk.close()

    initial = sparse(backed=False)
    before = parent_cid_of(reopened(initial, None))
    states = set()
    for cut in power_cuts_of_files(workload, initial=initial, guest_content=bytes(SIZE)):
        disk = reopened(cut.contents, None)
        changed = b"changed" in disk.read(0, GRAIN)
        states.add((parent_cid_of(disk) != before, changed))
        disk.close()
    assert states == {(False, False), (True, False), (True, True)}


def test_growing_and_shrinking() -> None:
    def workload(files: list[CrashFile], guest: GuestLog) -> None:
        disk = open_image(*files, options=WRITABLE)
        guest.write(disk, 0, b"a" * SIZE)
        guest.flush(disk)
        disk.truncate(300 * GRAIN)
        disk.write(299 * GRAIN, b"far away")
        disk.flush()
        disk.truncate(SIZE)
        guest.flush(disk)
        disk.truncate(200 * GRAIN)
        assert not any(disk.read(SIZE, 200 * GRAIN - SIZE))
        disk.close()

    sizes = set()
    for cut in power_cuts_of_files(
        workload, initial=sparse(backed=False), guest_content=bytes(SIZE), subsets=1
    ):
        disk = reopened(cut.contents, None)
        sizes.add(disk.size // GRAIN)
        cut.verify(disk.read(0, SIZE))
        if disk.size == 200 * GRAIN:
            assert not any(disk.read(SIZE, disk.size - SIZE))
        disk.close()
    assert sizes == {SIZE // GRAIN, 300, 200}


def test_the_proof_can_fail() -> None:
    """Without the flushes between the stages an entry is there before its data."""

    def workload(files: list[CrashFile], guest: GuestLog) -> None:
        disk = open_image(*files, options=WRITABLE)
        disk.writer.open_gate()
        disk.metadata.barrier = lambda: None  # type: ignore[method-assign]
        for start in range(0, SIZE, GRAIN):
            guest.write(disk, start, b"x" * GRAIN)
            disk.mapping.flush()

    old = bytearray(sparse(backed=False)[0])
    # What the file holds behind its tables is not what the guest wrote.
    old += b"\xee" * SIZE

    def play() -> None:
        for cut in power_cuts_of_files(
            workload, initial=[bytes(old)], guest_content=bytes(SIZE), subsets=8
        ):
            disk = reopened(cut.contents, None)
            try:
                cut.verify(disk.read(0, SIZE))
            except LaminaError as error:
                raise AssertionError(str(error)) from error

    with pytest.raises(AssertionError):
        play()
