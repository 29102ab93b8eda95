"""qcow2 between us and QEMU: what one wrote, the other reads, checks and goes on writing to."""

from __future__ import annotations

import itertools
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.session import Session
from lamina.errors import LaminaError

pytestmark = pytest.mark.peer

MIB = 1 << 20


@pytest.fixture
def session() -> Session:
    def refuse(text: str) -> None:
        raise AssertionError(f"unexpected warning: {text}")

    return Session(warn=refuse)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*command: object, codes: tuple[int, ...] = (0,)) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in codes, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def qemu_check(image: str) -> None:
    """Clean, without even a leak."""
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", image)


def qemu_reads(image: str, *options: str) -> bytes:
    run("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", image, image + ".raw")
    return Path(image + ".raw").read_bytes()


def qemu_io(image: str, *commands: str, options: tuple[str, ...] = ()) -> str:
    words = list(itertools.chain.from_iterable(("-c", command) for command in commands))
    return run("qemu-io", "-f", "qcow2", "-d", "unmap", *options, *words, image)


def option_text(options: dict[str, Any]) -> list[str]:
    return ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []


def we_read(image: str, session: Session) -> bytes:
    with Backend.open(image, session=session, format="qcow2") as disk:
        return disk.read(0, disk.size)


# -- creating --------------------------------------------------------------------------------------

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (8 * MIB, {}),
    (0, {}),
    (1000, {}),
    (100 << 30, {"compat": "0.10"}),
    (1 << 30, {"cluster_size": 512}),
    (1 << 30, {"cluster_size": 512, "refcount_bits": 1}),
    (20 * MIB, {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": "on"}),
    (5 << 40, {"cluster_size": "2M", "refcount_bits": 8}),
    (MIB, {"cluster_size": "4k", "compression_type": "zstd"}),
    (MIB, {"cluster_size": "8k", "refcount_bits": 32}),
    (4 * MIB, {"preallocation": "metadata"}),
    (3 * MIB + 512, {"preallocation": "metadata", "cluster_size": "16k"}),
    (MIB, {"backing_file": "base.raw", "backing_fmt": "raw"}),
    (MIB, {"backing_file": "base.raw", "backing_fmt": "raw", "compat": "0.10"}),
    (MIB, {"backing_file": "base.raw", "backing_fmt": "raw", "cluster_size": 512}),
    (9 * MIB, {"extended_l2": "on", "cluster_size": "16k"}),
    (300 << 30, {"extended_l2": "on", "cluster_size": "16k", "compression_type": "zstd"}),
    (MIB + 512, {"extended_l2": "on", "cluster_size": "32k", "preallocation": "metadata"}),
    (MIB, {"extended_l2": "on", "preallocation": "metadata", "backing_file": "base.raw",
           "backing_fmt": "raw"}),
    (MIB, {"data_file": "data"}),
    (MIB, {"data_file": "data", "backing_file": "base.raw", "backing_fmt": "raw"}),
    (MIB + 512, {"data_file": "data", "data_file_raw": "on", "cluster_size": "512"}),
    (MIB, {"data_file": "file:data", "preallocation": "metadata", "extended_l2": "on"}),
    (MIB - 512, {"data_file": "data", "preallocation": "full"}),
    (MIB, {"data_file": "data", "data_file_raw": "on", "extended_l2": "on"}),
    (MIB + 512, {"data_file": "data", "preallocation": "metadata", "extended_l2": "on"}),
]


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_new_images_are_those_of_qemu(number: int, session: Session) -> None:
    size, options = LAYOUTS[number]
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", MIB)
    create_image("ours", "qcow2", session=session, options=options, size=size)
    lengths = [Path("data").stat().st_size] if "data_file" in options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *option_text(options), "theirs", size)
    ours, theirs = Path("ours").read_bytes(), Path("theirs").read_bytes()
    assert len(ours) == len(theirs)
    assert ours == theirs
    if lengths:
        assert lengths == [Path("data").stat().st_size]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_preallocated(mode: str, cluster_size: int, session: Session) -> None:
    size = 7 * MIB + 1536
    options = {"preallocation": mode, "cluster_size": str(cluster_size)}
    create_image("ours", "qcow2", session=session, options=options, size=size)
    qemu_check("ours")
    allocated = run("qemu-img", "map", "--output=json", "ours")
    assert '"data": true' in allocated
    assert '"present": false' not in allocated
    assert qemu_reads("ours") == bytes(size)
    # Writing needs no more space.
    before = Path("ours").stat().st_size
    qemu_io("ours", f"write -P 7 0 {size}")
    assert Path("ours").stat().st_size == before
    if mode == "full":
        assert Path("ours").stat().st_blocks * 512 >= size


# -- reading and writing ---------------------------------------------------------------------------

ALL_KINDS = list(
    itertools.product(
        [512, 4096, 65536, 2 * MIB],
        [1, 2, 4, 8, 16, 32, 64],
        ["zlib", "zstd"],
    )
)
KINDS: list[dict[str, Any]] = [
    {"cluster_size": size, "refcount_bits": bits, "compression_type": codec}
    # A sample in which every value meets most others.
    for size, bits, codec in random.Random(7).sample(ALL_KINDS, 14)
] + [
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 65536, "compat": "0.10"},
    {"cluster_size": 4096, "lazy_refcounts": "on"},
]


class Guest:
    """A random workload, and what the disk reads as after it."""

    def __init__(self, size: int, unit: int, seed: int, content: bytes | None = None) -> None:
        self.rng = random.Random(seed)
        self.unit = unit
        self.content = bytearray(bytes(size) if content is None else content)

    def spot(self) -> tuple[int, int]:
        size = len(self.content)
        offset = self.rng.randrange(size)
        if self.rng.random() < 0.4:
            offset = offset // self.unit * self.unit
        length = self.rng.choice([1, 511, 4096, self.unit, 3 * self.unit, 100_000])
        return offset, min(length, size - offset, 2 * MIB)

    def whole_units(self) -> tuple[int, int]:
        first = self.rng.randrange(-(-len(self.content) // self.unit))
        start = first * self.unit
        most = max(1, (256 << 10) // self.unit)
        end = min(start + self.rng.randint(1, most) * self.unit, len(self.content))
        return start, end - start

    def ours(self, disk: Backend, steps: int) -> None:
        for _ in range(steps):
            offset, length = self.spot()
            span = slice(offset, offset + length)
            match self.rng.randrange(8):
                case 0:
                    flags = self.rng.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP])
                    disk.write_zeroes(offset, length, flags)
                    self.content[span] = bytes(length)
                case 1:
                    disk.discard(offset, length)
                    self.content[span] = disk.read(offset, length)
                case 2 if disk.node.supports_compressed_writes:
                    start, size = self.whole_units()
                    data = self.text(size)
                    disk.write_compressed([(start, data)])
                    self.content[start : start + size] = data
                case 3:
                    spots = [self.spot() for _ in range(6)]
                    requests = []
                    for at, size in sorted(spots):
                        if not requests or requests[-1][0] + len(requests[-1][1]) <= at:
                            requests.append((at, self.rng.randbytes(min(size, 5000))))
                    disk.writev(requests)
                    for at, data in requests:
                        self.content[at : at + len(data)] = data
                case _:
                    data = self.rng.randbytes(length)
                    disk.write(offset, data)
                    self.content[span] = data

    def text(self, size: int) -> bytes:
        """Compressible, for the most part."""
        if self.rng.random() < 0.2:
            return self.rng.randbytes(size)
        word = self.rng.randbytes(9)
        return (word * (size // 9 + 1))[:size]

    def theirs(self, image: str, steps: int) -> None:
        commands = []
        for _ in range(steps):
            offset, length = self.spot()
            offset = offset // 512 * 512
            length = max(length // 512 * 512, 512)
            length = min(length, len(self.content) - offset)
            pattern = self.rng.randrange(1, 255)
            if not self.rng.randrange(6):
                commands.append(f"write -z {offset} {length}")
                self.content[offset : offset + length] = bytes(length)
                continue
            commands.append(f"write -P {pattern} {offset} {length}")
            self.content[offset : offset + length] = bytes([pattern]) * length
        qemu_io(image, *commands)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_in_turns(number: int, session: Session) -> None:
    """Both write to one image, one after the other, on a chain of three."""
    options = KINDS[number]
    size = 3 * MIB + 512 * (number % 5)
    unit = int(options["cluster_size"])
    content = b""
    for depth in range(3):
        image = f"{depth}.qcow2"
        given = dict(options)
        if depth:
            given |= {"backing_file": f"{depth - 1}.qcow2", "backing_fmt": "qcow2"}
        # Overlays are shorter and longer than what is below them.
        length = size + [0, -8192, 70_000 // 512 * 512][depth]
        create_image(image, "qcow2", session=session, options=given, size=length)
        guest = Guest(length, unit, number + depth, content[:length].ljust(length, b"\0"))
        with Backend.open(image, session=session, format="qcow2", writable=True) as disk:
            guest.ours(disk, 12)
        qemu_check(image)
        assert qemu_reads(image) == guest.content
        guest.theirs(image, 12)
        assert we_read(image, session) == guest.content
        with Backend.open(
            image, session=session, format="qcow2", writable=True, discard="unmap"
        ) as disk:
            guest.ours(disk, 12)
            assert disk.read(0, disk.size) == guest.content
        qemu_check(image)
        assert qemu_reads(image) == guest.content
        content = bytes(guest.content)


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MIB])
def test_compressed_by_qemu(codec: str, cluster_size: int, session: Session) -> None:
    """Odd sizes, clusters that share host clusters, clusters that did not shrink."""
    guest = Guest(2 * MIB + 1536, cluster_size, cluster_size)
    for start in range(0, len(guest.content), 40_000):
        data = guest.text(min(40_000, len(guest.content) - start))
        guest.content[start : start + len(data)] = data
    Path("source.raw").write_bytes(guest.content)
    options = f"cluster_size={cluster_size},compression_type={codec}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options,
        "source.raw", "c.qcow2")
    assert we_read("c.qcow2", session) == guest.content
    with Backend.open("c.qcow2", session=session, format="qcow2", writable=True) as disk:
        for place in (0, 5000, 70_000, len(guest.content) - 10):
            assert disk.read(place, 10) == guest.content[place : place + 10]
        guest.ours(disk, 30)
    qemu_check("c.qcow2")
    assert qemu_reads("c.qcow2") == guest.content


def test_many_tables(session: Session) -> None:
    """More tables than the caches hold, a refcount table that has to grow."""
    size = 600 * MIB
    options = {"cluster_size": "512", "refcount_bits": "64"}
    create_image("t.qcow2", "qcow2", session=session, options=options, size=size)
    rng = random.Random(3)
    places = sorted(rng.sample(range(0, size, 65536), 1500))
    small = {"l2-cache-size": "4096", "refcount-cache-size": "0"}
    with Backend.open(
        "t.qcow2", session=session, format="qcow2", writable=True, options=small
    ) as disk:
        for place in rng.sample(places, len(places)):
            disk.write(place, place.to_bytes(8, "big") * 300)
        for place in places:
            assert disk.read(place, 8) == place.to_bytes(8, "big")
    qemu_check("t.qcow2")
    assert run("qemu-io", "-r", "-c", f"read -v {places[7]} 8", "t.qcow2")
    raw = qemu_reads("t.qcow2")
    assert all(raw[place : place + 8] == place.to_bytes(8, "big") for place in places)
    assert len(raw) - raw.count(0) < 1500 * 2400


# -- snapshots of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"cluster_size": "4k"}])
def test_writing_leaves_snapshots_alone(options: dict[str, str], session: Session) -> None:
    size = 4 * MIB
    unit = 4096 if options.get("cluster_size") else 65536
    create_image("s.qcow2", "qcow2", session=session, options=options, size=size)
    guest = Guest(size, unit, 5)
    states = []
    for name in ("one", "two"):
        with Backend.open("s.qcow2", session=session, format="qcow2", writable=True) as disk:
            guest.ours(disk, 15)
        run("qemu-img", "snapshot", "-c", name, "s.qcow2")
        states.append((name, bytes(guest.content)))
    with Backend.open(
        "s.qcow2", session=session, format="qcow2", writable=True, discard="unmap"
    ) as disk:
        guest.ours(disk, 25)
        assert [snapshot.name for snapshot in disk.info().snapshots] == ["one", "two"]
    qemu_check("s.qcow2")
    assert qemu_reads("s.qcow2") == guest.content
    for name, content in states:
        assert qemu_reads("s.qcow2", "-l", f"snapshot.name={name}") == content
    run("qemu-img", "snapshot", "-d", "one", "s.qcow2")
    run("qemu-img", "snapshot", "-a", "two", "s.qcow2")
    qemu_check("s.qcow2")


# -- dirty images ----------------------------------------------------------------------------------


def test_dirty_image_is_repaired(session: Session) -> None:
    """QEMU crashed with lazy refcounts: counts are rebuilt when we open the image for writing."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "d.qcow2", "4M")
    run("qemu-io", "-c", "write -P 3 0 200k", "-c", "flush", "-c", "abort", "d.qcow2",
        codes=(-6, 134))
    assert '"dirty-flag": true' in run("qemu-img", "info", "--output=json", "d.qcow2")
    warnings: list[str] = []
    lenient = Session(warn=warnings.append)
    with Backend.open("d.qcow2", session=lenient, format="qcow2", writable=True) as disk:
        assert disk.read(0, 200 << 10) == b"\3" * (200 << 10)
        disk.write(MIB, b"\4" * 1000)
    qemu_check("d.qcow2")
    assert '"dirty-flag": true' not in run("qemu-img", "info", "--output=json", "d.qcow2")
    assert qemu_reads("d.qcow2")[MIB : MIB + 1000] == b"\4" * 1000


def test_our_crash_is_repaired_by_qemu(session: Session) -> None:
    create_image(
        "d.qcow2", "qcow2", session=session, options={"lazy_refcounts": "on"}, size=4 * MIB
    )
    disk = Backend.open("d.qcow2", session=session, format="qcow2", writable=True)
    disk.write(12345, b"x" * 300_000)
    disk.flush()
    # What is on disk now is what a crash would leave.
    Path("crashed.qcow2").write_bytes(Path("d.qcow2").read_bytes())
    disk.close()
    qemu_check("d.qcow2")
    assert '"dirty-flag": true' in run("qemu-img", "info", "--output=json", "crashed.qcow2")
    run("qemu-img", "check", "-r", "all", "crashed.qcow2")
    qemu_check("crashed.qcow2")
    assert qemu_reads("crashed.qcow2")[12345 : 12345 + 300_000] == b"x" * 300_000


# -- resizing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cluster_size": "512"}, {"compat": "0.10"}])
def test_resizing(options: dict[str, str], session: Session) -> None:
    size = 3 * MIB
    create_image("r.qcow2", "qcow2", session=session, options=options, size=size)
    guest = Guest(size, 65536, 11)
    rng = random.Random(2)
    for _ in range(6):
        with Backend.open(
            "r.qcow2", session=session, format="qcow2", writable=True, resize=True
        ) as disk:
            guest.ours(disk, 6)
            new = rng.randrange(1, 12_000) * 512
            disk.truncate(new)
            del guest.content[new:]
            guest.content.extend(bytes(new - len(guest.content)))
            assert disk.size == new
        qemu_check("r.qcow2")
        assert qemu_reads("r.qcow2") == guest.content
    if "compat" not in options:
        run("qemu-img", "resize", "--shrink", "r.qcow2", "64k")
        assert we_read("r.qcow2", session) == guest.content[:65536].ljust(65536, b"\0")


@pytest.mark.parametrize("mode", [Preallocation.METADATA, Preallocation.FALLOC, Preallocation.FULL])
def test_growing_with_preallocation(mode: Preallocation, session: Session) -> None:
    create_image(
        "g.qcow2", "qcow2", session=session, options={"cluster_size": "4k"}, size=MIB
    )
    guest = Guest(MIB, 4096, 3)
    with Backend.open(
        "g.qcow2", session=session, format="qcow2", writable=True, resize=True
    ) as disk:
        guest.ours(disk, 20)
        disk.truncate(5 * MIB + 512, mode)
        guest.content.extend(bytes(4 * MIB + 512))
        assert disk.read(0, disk.size) == guest.content
    qemu_check("g.qcow2")
    assert qemu_reads("g.qcow2") == guest.content
    assert '"present": false' not in run(
        "qemu-img", "map", "--output=json", "--start-offset", MIB, "g.qcow2"
    )


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_growing_hides_a_longer_backing_file(compat: str, session: Session) -> None:
    Path("base.raw").write_bytes(b"\x55" * MIB)
    options = {"backing_file": "base.raw", "backing_fmt": "raw", "compat": compat}
    create_image("o.qcow2", "qcow2", session=session, options=options, size=MIB // 2 - 1024)
    with Backend.open(
        "o.qcow2", session=session, format="qcow2", writable=True, resize=True
    ) as disk:
        disk.truncate(2 * MIB)
    expected = (b"\x55" * (MIB // 2 - 1024)).ljust(2 * MIB, b"\0")
    assert we_read("o.qcow2", session) == expected
    assert qemu_reads("o.qcow2") == expected
    qemu_check("o.qcow2")


@pytest.mark.parametrize(
    ("options", "snapshot", "size", "message"),
    [
        ({}, False, 1000, "The new size must be a multiple of 512"),
        ({"compat": "0.10"}, True, 2 * MIB, "Can't resize a v2 image which has snapshots"),
    ],
)
def test_refused_resizes(
    options: dict[str, str], snapshot: bool, size: int, message: str, session: Session
) -> None:
    create_image("n.qcow2", "qcow2", session=session, options=options, size=MIB)
    if snapshot:
        run("qemu-img", "snapshot", "-c", "s", "n.qcow2")
    before = Path("n.qcow2").read_bytes()
    with Backend.open(
        "n.qcow2", session=session, format="qcow2", writable=True, resize=True
    ) as disk, pytest.raises(LaminaError, match=message):
        disk.node.truncate(size)
    assert Path("n.qcow2").read_bytes() == before
