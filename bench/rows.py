"""What is measured, with the ratio that each row has to reach (our speed / the peer's)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OURS = str(Path(sys.executable).with_name("lamina-img"))
THEIRS = "qemu-img"
MIB = 1 << 20
_PIECE = 64 << 10


@dataclass(frozen=True)
class Row:
    name: str
    goal: float
    ours: list[str]
    theirs: list[str]
    target: Path | None = None
    """Written by both; removed before each run."""
    own_image: str = ""
    """Made for this row alone: removed after it."""
    slow: bool = False
    """Takes so long that two repeats have to do."""
    measure: bool = False
    """The commands say what they took: it is not the whole of them that matters."""


@dataclass
class Workbench:
    """Images to measure with, made when they are first needed."""

    directory: Path
    size: int
    """Bytes of the disks that are converted."""
    table_size: int
    """Bytes of the disks whose tables are walked."""
    made: dict[str, Path] = field(default_factory=dict)

    def image(self, name: str, maker: Callable[[Path], None]) -> Path:
        if name not in self.made:
            path = self.directory / name
            maker(path)
            self.made[name] = path
        return self.made[name]

    def raw(self, part: int = 1) -> Path:
        """Half of it data, in runs of up to 4 MiB; two thirds of that compress well. ``part``: as
        long as this part of the whole, for work that takes its time."""
        size = self.size // part

        def maker(path: Path) -> None:
            rng = random.Random(1)
            words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(500)]
            with open(path, "wb") as file:
                file.truncate(size)
                at = 0
                while at < size:
                    length = min(rng.randrange(1, 65) * 65536, size - at)
                    if rng.random() < 0.5:
                        file.seek(at)
                        if rng.random() < 0.66:
                            text = b"".join(rng.choices(words, k=length // 6))
                            file.write(text[:length].ljust(length, b"\n"))
                        else:
                            file.write(rng.randbytes(length))
                    at += length

        return self.image("data.raw" if part == 1 else f"data-{part}.raw", maker)

    def remove(self, name: str) -> None:
        """Make room."""
        if name in self.made:
            self.made.pop(name).unlink()

    def dense(self) -> Path:
        """A raw file without a hole, of a gibibyte at most."""

        def maker(path: Path) -> None:
            block = random.Random(2).randbytes(MIB)
            with open(path, "wb") as file:
                for number in range(min(self.size // MIB, 1024)):
                    file.write(number.to_bytes(8, "big") + block[8:])
            _in_small_folios(path)

        return self.image("dense.raw", maker)

    def small_requests(self, format: str) -> Path:
        """What small requests go to, in one format or the other."""
        if format == "raw":
            return self.dense()
        new = "dense.qcow2" not in self.made
        image = self.converted("dense.qcow2", "-O", "qcow2", source=self.dense())
        if new:
            _in_small_folios(image)
        return image

    def converted(self, name: str, *options: str, source: Path | None = None) -> Path:
        origin = source or self.raw()

        def maker(path: Path) -> None:
            command = [THEIRS, "convert", "-f", "raw", *options, str(origin), str(path)]
            subprocess.run(command, check=True)

        return self.image(name, maker)

    def dmg(self) -> Path:
        """A quarter of the raw image in zlib chunks of 256 KiB, zeroes left out."""

        def maker(path: Path) -> None:
            command = [sys.executable, "-m", "bench.dmg", str(self.raw(4)), str(path)]
            subprocess.run(command, check=True)

        return self.image("data.dmg", maker)

    def tables(self, name: str, kind: str) -> Path:
        """``kind``: as for ``bench.images``."""

        def maker(path: Path) -> None:
            # In a process of its own: what this one needs would count as memory of its children.
            command = [sys.executable, "-m", "bench.images", kind, str(self.table_size), path]
            subprocess.run(command, check=True)

        return self.image(name, maker)


def _in_small_folios(path: Path) -> None:
    """Write a file again, a little at a time.

    Written in large pieces it lies in large folios of the host's cache, and ext4 takes up to 50 µs
    to change a block of one: a test of small requests would compare the host with itself.
    """
    copy = path.with_name("copy")
    with open(path, "rb") as old, open(copy, "wb", buffering=0) as new:
        while piece := old.read(_PIECE):
            new.write(piece)
    copy.replace(path)


def rows(bench: Workbench) -> Iterator[Callable[[], Row]]:
    """Thunks, so that images are made only for rows that run; see ``NAMES``."""
    for name, goal in CONVERSIONS:
        yield lambda name=name, goal=goal: _conversion(bench, name, goal)
    for name, goal in TABLES:
        yield lambda name=name, goal=goal: _tables(bench, name, goal)
    for name, goal in ENCRYPTED:
        yield lambda name=name, goal=goal: _encrypted(bench, name, goal)
    for name, goal in REQUESTS:
        yield lambda name=name, goal=goal: _requests(bench, name, goal)
    for name, goal in NETWORK:
        yield lambda name=name, goal=goal: _network(bench, name, goal)
    for name, goal in SMALL:
        yield lambda name=name, goal=goal: _small(bench, name, goal)


CONVERSIONS = [
    ("raw-raw", 1.5),
    ("raw-raw-dense", 1.0),
    ("raw-qcow2", 1.2),
    ("qcow2-raw", 1.5),
    ("qcow2-qcow2", 1.1),
    ("compress-zlib", 3.0),
    ("compress-zstd", 1.2),
    ("decompress-zlib", 1.5),
    ("decompress-zstd", 1.3),
    ("compare", 1.0),
    ("raw-qed", 1.0),
    ("qed-raw", 1.0),
    ("raw-parallels", 1.0),
    ("parallels-raw", 1.0),
    ("dmg-raw", 1.3),
    ("raw-vmdk", 1.0),
    ("vmdk-raw", 1.0),
    ("raw-vmdk-stream", 1.0),
    ("vmdk-stream-raw", 1.0),
    ("raw-vhdx", 1.0),
    ("vhdx-raw", 1.0),
    ("raw-vdi", 1.0),
    ("vdi-raw", 1.0),
    ("raw-vpc", 1.0),
    ("vpc-raw", 1.0),
]
OTHER_FORMATS = ("parallels", "qed", "vdi", "vhdx", "vmdk", "vpc")
"""Converted from and to raw, without further options."""
TABLES = [
    ("check-full", 3.0),
    ("check-fragmented", 8.0),
    ("map-full", 3.0),
    ("map-fragmented", 3.0),
    ("measure-full", 4.0),
    ("measure-fragmented", 4.0),
    ("merge-recorded", 1.0),
    ("snapshot-full", 1.0),
]
ENCRYPTED = [
    ("luks-write", 1.0),
    ("luks-read", 1.0),
    ("qcow2-luks-write", 1.0),
    ("qcow2-luks-read", 1.0),
]
REQUESTS = [
    ("bench-raw-read-1", 2.0),
    ("bench-raw-read-64", 1.1),
    ("bench-raw-write-64", 1.0),
    ("bench-qcow2-read-1", 1.0),
    ("bench-qcow2-read-64", 1.0),
    ("bench-qcow2-write-64", 1.0),
]
NETWORK = [
    ("nbd-raw-read-1", 1.3),
    ("nbd-raw-read-32", 1.2),
    ("nbd-raw-write-1", 1.0),
    ("nbd-raw-write-32", 1.2),
    ("nbd-raw-sequential-read", 1.2),
    ("nbd-raw-sequential-write", 1.2),
    ("nbd-qcow2-read-1", 1.0),
    ("nbd-qcow2-read-32", 1.5),
    ("nbd-qcow2-write-1", 1.0),
    ("nbd-qcow2-write-32", 1.3),
    ("nbd-qcow2-sequential-read", 1.2),
    ("nbd-qcow2-sequential-write", 1.2),
    ("nbdkit-read-1", 1.3),
    ("nbdkit-read-32", 1.2),
    ("nbdkit-write-32", 1.2),
    ("nbdkit-sequential-read", 1.2),
    ("nbdkit-sequential-write", 1.2),
    ("nbd-copy", 1.0),
]
"""Our server against qemu-nbd and, from raw files, nbdkit; our client against nbdcopy."""
SMALL = [("info", 0.25), ("create", 0.25)]
"""Against ``python -c pass``: at most four times as long."""
NAMES = [name for name, _ in (*CONVERSIONS, *TABLES, *ENCRYPTED, *REQUESTS, *NETWORK, *SMALL)]


def _conversion(bench: Workbench, name: str, goal: float) -> Row:
    target = bench.directory / "target"
    zlib, zstd = ["-c", "-O", "qcow2"], ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
    qcow2 = ["-O", "qcow2"]
    if name == "compare":
        image = str(bench.converted("data.qcow2", *qcow2))
        words = ["compare", "-f", "raw", "-F", "qcow2", str(bench.raw()), image]
        return Row(name, goal, [OURS, *words], [THEIRS, *words])
    other = name.removeprefix("raw-").removesuffix("-raw")
    if other in OTHER_FORMATS:
        return _other_format(bench, name, goal)
    if name == "dmg-raw":
        words = ["convert", "-W", "-m", "16", "-O", "raw", str(bench.dmg()), str(target)]
        return Row(name, goal, [OURS, *words], [THEIRS, *words], target, "data.dmg")
    stream = ["-O", "vmdk", "-o", "subformat=streamOptimized"]

    def compressed(name: str, options: list[str]) -> str:
        return str(bench.converted(name, *options, source=bench.raw(4)))

    source, options = {
        "raw-raw": (lambda: ["-f", "raw", str(bench.raw())], ["-O", "raw"]),
        "raw-raw-dense": (lambda: ["-f", "raw", str(bench.dense())], ["-O", "raw"]),
        "raw-qcow2": (lambda: ["-f", "raw", str(bench.raw())], qcow2),
        "qcow2-raw": (lambda: [str(bench.converted("data.qcow2", *qcow2))], ["-O", "raw"]),
        "qcow2-qcow2": (lambda: [str(bench.converted("data.qcow2", *qcow2))], qcow2),
        "compress-zlib": (lambda: ["-f", "raw", str(bench.raw(4))], zlib),
        "compress-zstd": (lambda: ["-f", "raw", str(bench.raw(4))], zstd),
        "decompress-zlib": (lambda: [compressed("z.qcow2", zlib)], ["-O", "raw"]),
        "decompress-zstd": (lambda: [compressed("zs.qcow2", zstd)], ["-O", "raw"]),
        "raw-vmdk-stream": (lambda: ["-f", "raw", str(bench.raw(4))], stream),
        "vmdk-stream-raw": (lambda: [compressed("s.vmdk", stream)], ["-O", "raw"]),
    }[name]
    # QEMU can write a stream in order only.
    parallel = [] if name == "raw-vmdk-stream" else ["-W", "-m", "16"]
    words = ["convert", *parallel, *options, *source(), str(target)]
    return Row(name, goal, [OURS, *words], [THEIRS, *words], target)


def _other_format(bench: Workbench, name: str, goal: float) -> Row:
    source, target = name.split("-")
    own = "" if source == "raw" else f"data.{source}"
    image = bench.converted(own, "-O", source) if own else bench.raw()
    path = bench.directory / "target"
    words = ["convert", "-W", "-m", "16", "-f", source, "-O", target, str(image), str(path)]
    return Row(name, goal, [OURS, *words], [THEIRS, *words], path, own)


def _tables(bench: Workbench, name: str, goal: float) -> Row:
    work, kind = name.split("-")
    kinds = {"full": "contiguous", "fragmented": "shuffled", "recorded": "recorded"}
    image = str(bench.tables(f"{kind}.qcow2", kinds[kind]))
    if work == "snapshot":
        # Made and deleted, so that the next run finds what this one found.
        both = '"$0" snapshot -c s "$1" && "$0" snapshot -d s "$1"'
        ours, theirs = (["sh", "-c", both, tool, image] for tool in (OURS, THEIRS))
        return Row(name, goal, ours, theirs, slow=True)
    words = {
        "check": ["check", image],
        "map": ["map", "--output=json", image],
        "measure": ["measure", "-O", "qcow2", image],
        # Emptied first, so that there is something to do each time.
        "merge": ["bitmap", "--clear", "--merge", "a", image, "b"],
    }[work]
    return Row(name, goal, [OURS, *words], [THEIRS, *words], slow=True)


def _encrypted(bench: Workbench, name: str, goal: float) -> Row:
    """Into a volume that is there already, or out of it: deriving a key takes a fixed time."""
    format, _, way = name.rpartition("-")
    driver, prefix = ("luks", "") if format == "luks" else ("qcow2", "encrypt.")
    secret = ["--object", "secret,id=key,data=secret"]

    def maker(path: Path) -> None:
        options = f"{prefix}key-secret=key,{prefix}iter-time=10"
        options += ",encrypt.format=luks" if prefix else ""
        create = [THEIRS, "create", "-q", *secret, "-f", driver, "-o", options]
        subprocess.run([*create, str(path), str(bench.dense().stat().st_size)], check=True)
        fill = [THEIRS, "convert", *secret, "-n", "-f", "raw", "--target-image-opts"]
        subprocess.run([*fill, str(bench.dense()), described(path)], check=True)

    def described(path: Path) -> str:
        return f"driver={driver},file.filename={path},{prefix}key-secret=key"

    volume = described(bench.image(f"{format}.volume", maker))
    target = bench.directory / "target"
    if way == "read":
        words = ["convert", *secret, "--image-opts", volume, "-O", "raw", str(target)]
    else:
        dense = str(bench.dense())
        words = ["convert", *secret, "-n", "-f", "raw", "--target-image-opts", dense, volume]
    theirs = [THEIRS, words[0], "-W", "-m", "16", *words[1:]]
    return Row(name, goal, [OURS, *words], theirs, target if way == "read" else None)


def _requests(bench: Workbench, name: str, goal: float) -> Row:
    _, format, kind, depth = name.split("-")
    image = bench.small_requests(format)
    # A step that is no multiple of the disk's length visits it all over.
    step = 4096 * 7919
    words = ["bench", "-f", format, "-c", "75000", "-d", depth, "-s", "4096", "-S", str(step)]
    # Not zeroes: other rows make their images of this one.
    words += ["-w", "--pattern", "65"] if kind == "write" else []
    theirs = [THEIRS, *words, "-i", "io_uring", str(image)]
    return Row(name, goal, [OURS, *words, str(image)], theirs)


def _network(bench: Workbench, name: str, goal: float) -> Row:
    peer, format, *load = name.split("-")
    runner = [sys.executable, "-m", "bench.nbd"]
    if format == "copy":
        target = bench.directory / "target"
        server = [*runner, "qemu-nbd", "raw", str(bench.raw())]
        ours, theirs = ([*server, tool, str(target)] for tool in ("lamina-img", "nbdcopy"))
        return Row(name, goal, ours, theirs, target, measure=True)
    if peer == "nbdkit":
        format, load = "raw", [format, *load]
    else:
        peer = "qemu-nbd"
    image = bench.small_requests(format)
    words = [format, str(image), "-".join(load)]
    ours, theirs = ([*runner, server, *words] for server in ("lamina-nbd", peer))
    return Row(name, goal, ours, theirs, measure=True)


def _small(bench: Workbench, name: str, goal: float) -> Row:
    target = None
    if name == "info":
        image = bench.directory / "small.qcow2"
        subprocess.run([THEIRS, "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        words = ["info", str(image)]
    else:
        target = bench.directory / "target"
        words = ["create", "-q", "-f", "qcow2", str(target), "1G"]
    return Row(name, goal, [OURS, *words], [sys.executable, "-c", "pass"], target)
