"""Bitmaps kept in qcow2 images, between us and QEMU: one's records are the other's, by turns."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lamina.block import registry
from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.driver import find_bitmap
from lamina.block.session import Session
from lamina.errors import LaminaError

pytestmark = pytest.mark.peer

KIB, MIB = 1 << 10, 1 << 20
QCOW2 = registry.driver("qcow2")


@pytest.fixture
def session() -> Session:
    def refuse(text: str) -> None:
        raise AssertionError(f"unexpected warning: {text}")

    return Session(warn=refuse)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*command: object) -> str:
    words = [str(word) for word in command]
    if words[0].startswith("lamina-"):
        words[0] = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_check(image: str) -> None:
    """Clean, without even a leak."""
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", image)


def qemu_bitmaps(image: str) -> list[dict[str, Any]]:
    about = json.loads(run("qemu-img", "info", "--output=json", image))
    found: list[dict[str, Any]] = about["format-specific"]["data"].get("bitmaps", [])
    return found


@contextmanager
def exported(image: str, name: str) -> Iterator[str]:
    """The image, by QEMU's server, with what the bitmap says as its only metadata."""
    path = Path.cwd() / "s"
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(path), image],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not listens(path):
            assert server.poll() is None, server.stdout.read() if server.stdout else ""
            time.sleep(0.01)
        yield (
            f"driver=nbd,server.type=unix,server.path={path},"
            f"x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        )
    finally:
        server.kill()
        server.wait()


def listens(path: Path) -> bool:
    """Somebody answers there: a server's socket exists a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def qemu_ranges(image: str, name: str) -> list[tuple[int, int]]:
    """(offset, length) of what is dirty, as QEMU reads it."""
    with exported(image, name) as address:
        rows = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", address))
    found: list[tuple[int, int]] = []
    for row in rows:
        if row["data"]:
            continue
        start, length = row["start"], row["length"]
        if found and sum(found[-1]) == start:
            start, length = found[-1][0], length + found.pop()[1]
        found.append((start, length))
    return found


def our_ranges(image: str, name: str, session: Session) -> list[tuple[int, int]]:
    with Backend.open(image, session=session, format="qcow2") as disk:
        return list(find_bitmap(disk.node, name).ranges())


class Turns:
    """One image, changed by us and by QEMU, and what its bitmaps have to say."""

    def __init__(self, seed: int, size: int, session: Session, by_us: float) -> None:
        self.rng = random.Random(seed)
        self.size = size
        self.session = session
        self.by_us = by_us
        """How much of the work is ours."""
        self.sets: dict[str, set[int]] = {}
        """Dirty granules."""
        self.granularity: dict[str, int] = {}
        self.enabled: dict[str, bool] = {}

    def granules(self, name: str, offset: int, length: int) -> range:
        unit = self.granularity[name]
        return range(offset // unit, -(-(offset + length) // unit))

    def ranges(self, name: str) -> list[tuple[int, int]]:
        unit = self.granularity[name]
        found: list[tuple[int, int]] = []
        for granule in sorted(self.sets[name]):
            start = granule * unit
            length = min(unit, self.size - start)
            if found and sum(found[-1]) == start:
                start, length = found[-1][0], length + found.pop()[1]
            found.append((start, length))
        return found

    def bitmap(self, *what: str) -> None:
        """The arguments of ``qemu-img bitmap`` before the image."""
        *actions, name = what
        if self.rng.random() >= self.by_us:
            run("qemu-img", "bitmap", "-f", "qcow2", *actions[:-1], actions[-1], "i", name)
            return
        with Backend.open("i", session=self.session, format="qcow2", writable=True) as disk:
            match actions:
                case ["--add", "-g", granularity]:
                    QCOW2.add_bitmap(disk.node, name, int(granularity))
                case ["--merge", other]:
                    QCOW2.merge_bitmap(disk.node, name, disk.node, other)
                case ["--remove"]:
                    QCOW2.remove_bitmap(disk.node, name)
                case ["--clear"]:
                    QCOW2.clear_bitmap(disk.node, name)
                case [switch]:
                    QCOW2.enable_bitmap(disk.node, name, switch == "--enable")

    def change_disk(self) -> None:
        rng = self.rng
        spans = []
        for _ in range(rng.randrange(1, 5)):
            offset = rng.randrange(self.size // 512) * 512
            length = min(rng.choice([512, 4 * KIB, 70 * KIB]), self.size - offset)
            spans.append((rng.choice(["write", "write -z", "discard"]), offset, length))
        if rng.random() < self.by_us:
            with Backend.open(
                "i", session=self.session, format="qcow2", writable=True, discard="unmap"
            ) as disk:
                for action, offset, length in spans:
                    if action == "write":
                        disk.write(offset, rng.randbytes(length))
                    elif action == "discard":
                        disk.discard(offset, length)
                    else:
                        disk.write_zeroes(offset, length)
        else:
            words = [
                word
                for action, offset, length in spans
                for word in ("-c", f"{action} {offset} {length}")
            ]
            run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, "i")
        for name, granules in self.sets.items():
            if self.enabled[name]:
                for _, offset, length in spans:
                    granules.update(self.granules(name, offset, length))

    def step(self) -> None:
        rng = self.rng
        names = list(self.sets)
        action = rng.choice(["disk"] * 4 + ["add", "add", "remove", "clear", "switch", "merge"])
        if action == "disk":
            self.change_disk()
        elif action == "add" and len(names) < 4:
            name = f"b{len(names)}-{rng.randrange(1000)}"
            self.granularity[name] = 1 << rng.choice([9, 12, 16, 21])
            self.bitmap("--add", "-g", str(self.granularity[name]), name)
            self.sets[name], self.enabled[name] = set(), True
        elif names:
            name = rng.choice(names)
            if action == "remove":
                self.bitmap("--remove", name)
                del self.sets[name], self.enabled[name]
            elif action == "clear":
                self.bitmap("--clear", name)
                self.sets[name].clear()
            elif action == "switch":
                self.enabled[name] = not self.enabled[name]
                self.bitmap("--enable" if self.enabled[name] else "--disable", name)
            elif action == "merge":
                other = rng.choice(names)
                self.bitmap("--merge", other, name)
                for start, length in self.ranges(other):
                    self.sets[name].update(self.granules(name, start, length))

    def check(self) -> None:
        qemu_check("i")
        assert qemu_bitmaps("i") == [
            {
                "flags": ["auto"] if self.enabled[one["name"]] else [],
                "name": one["name"],
                "granularity": self.granularity[one["name"]],
            }
            for one in qemu_bitmaps("i")
        ]
        for name in self.sets:
            expected = self.ranges(name)
            assert our_ranges("i", name, self.session) == expected
        assert {one["name"] for one in qemu_bitmaps("i")} == set(self.sets)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (5 * MIB + 512, {}),
        (3 * MIB + 512, {"cluster_size": "512"}),
        (64 * MIB, {"cluster_size": "4k", "refcount_bits": "1"}),
        (9 * MIB, {"cluster_size": "2M", "lazy_refcounts": "on"}),
        (7 * MIB, {"cluster_size": "16k", "extended_l2": "on"}),
        (6 * MIB, {"data_file": "d"}),
    ],
    ids=["plain", "small", "narrow", "large", "extended", "external"],
)
@pytest.mark.parametrize("by_us", [1.0, 0.5])
def test_by_turns(size: int, options: dict[str, str], by_us: float, session: Session) -> None:
    create_image("i", "qcow2", session=session, options=options, size=size)
    turns = Turns(size, size, session, by_us)
    for number in range(20):
        turns.step()
        if number % 5 == 4:
            turns.check()
    turns.check()
    for name in turns.sets:
        assert qemu_ranges("i", name) == turns.ranges(name)


@pytest.mark.parametrize("cluster_size", ["512", "64k"])
def test_resized_by_either(cluster_size: str, session: Session) -> None:
    options = {"cluster_size": cluster_size}
    create_image("i", "qcow2", session=session, options=options, size=3 * MIB)
    names = {"fine": 512, "coarse": 65536}
    for name, granularity in names.items():
        run("qemu-img", "bitmap", "--add", "-g", granularity, "i", name)
    run("qemu-io", "-c", "write 0 100k", "-c", "write 2900k 100k", "i")
    for by_us, size in ((True, 40 * MIB), (False, 90 * MIB), (True, MIB), (False, 20 * MIB)):
        if by_us:
            with Backend.open("i", session=session, format="qcow2", writable=True) as disk:
                disk.truncate(size)
        else:
            run("qemu-img", "resize", "-f", "qcow2", "i", size)
        qemu_check("i")
        for name in names:
            assert qemu_ranges("i", name) == our_ranges("i", name, session)
    assert our_ranges("i", "fine", session) == [(0, 100 * KIB)]


def test_clusters_of_ones(session: Session) -> None:
    """We have no need of clusters whose bits are all set; QEMU reads that, and goes on from there.
    """
    create_image("i", "qcow2", session=session, options={"cluster_size": "512"}, size=16 * MIB)
    with Backend.open("i", session=session, format="qcow2", writable=True) as disk:
        QCOW2.add_bitmap(disk.node, "b", 512)
        disk.write_zeroes(2 * MIB, 5 * MIB)
    assert qemu_ranges("i", "b") == [(2 * MIB, 5 * MIB)]
    run("qemu-io", "-f", "qcow2", "-c", "write 0 512", "i")
    assert our_ranges("i", "b", session) == [(0, 512), (2 * MIB, 5 * MIB)]
    qemu_check("i")


def test_the_same_bytes(session: Session) -> None:
    """The same steps leave the same file, wherever nobody's data decides."""
    steps = [
        ["bitmap", "--add", "i", "one"],
        ["bitmap", "--add", "-g", "512", "--disable", "i", "two"],
        ["io", "write 0 1M"],
        ["io", "write 3M 64k"],
        ["bitmap", "--merge", "one", "i", "two"],
        ["snapshot", "-c", "s", "i"],
        ["bitmap", "--add", "-g", "1M", "i", "three"],
        ["bitmap", "--remove", "i", "one"],
        ["io", "write 1M 64k"],
        ["bitmap", "--clear", "i", "two"],
        ["bitmap", "--enable", "--merge", "three", "i", "two"],
        ["bitmap", "--remove", "i", "two"],
        ["bitmap", "--remove", "i", "three"],
    ]
    contents = []
    for tool in ("qemu", "lamina"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "i", "10M")
        states = []
        for command, *arguments in steps:
            if command == "io":
                run(f"{tool}-io", "-f", "qcow2", "-c", *arguments, "i")
            else:
                run(f"{tool}-img", command, *arguments)
            qemu_check("i")
            states.append(run("qemu-img", "info", "i").split("disk size")[0])
            states.append(str(qemu_bitmaps("i")))
        contents.append(states)
    assert contents[0] == contents[1]


def test_converted(session: Session) -> None:
    for tool, other in (("lamina", "qemu"), ("qemu", "lamina")):
        run("qemu-img", "create", "-q", "-f", "qcow2", "i", "10M")
        run(f"{other}-img", "bitmap", "--add", "-g", "4k", "i", "one")
        run(f"{other}-io", "-c", "write 1M 100k", "i")
        run(f"{other}-img", "bitmap", "--add", "--disable", "i", "two")
        run(f"{other}-img", "bitmap", "--merge", "one", "i", "two")
        options = ["-o", "cluster_size=4k"] if tool == "qemu" else []
        run(f"{tool}-img", "convert", "--bitmaps", "-O", "qcow2", *options, "i", "j")
        assert qemu_bitmaps("j") == qemu_bitmaps("i")
        qemu_check("j")
        assert qemu_ranges("j", "one") == our_ranges("j", "one", session) == [(MIB, 100 * KIB)]
        assert our_ranges("j", "two", session) == [(MIB, 128 * KIB)]
        measured = json.loads(run(f"{tool}-img", "measure", "-O", "qcow2", "--output=json", "i"))
        theirs = json.loads(run(f"{other}-img", "measure", "-O", "qcow2", "--output=json", "i"))
        assert measured == theirs


def test_committed_and_rebased(session: Session) -> None:
    """What is written to a base is recorded there; the overlay's bitmaps stay."""
    results = []
    for tool in ("qemu", "lamina"):
        for name, options in (("base", []), ("top", ["-b", "base", "-F", "qcow2"])):
            run("qemu-img", "create", "-q", "-f", "qcow2", *options, name, "4M")
            run("qemu-img", "bitmap", "--add", name, "b")
        run("qemu-io", "-c", "write 1M 200k", "top")
        run(f"{tool}-img", "commit", "top")
        states = [our_ranges(name, "b", session) for name in ("base", "top")]
        run("qemu-img", "create", "-q", "-f", "qcow2", "new", "4M")
        run(f"{tool}-img", "rebase", "-b", "new", "-F", "qcow2", "top")
        states.append(our_ranges("top", "b", session))
        results.append(states)
        for name in ("base", "top"):
            qemu_check(name)
    assert results[0] == results[1]
    assert results[0][0] == results[0][1] == [(MIB, 256 * KIB)]


def test_a_crash_of_either(session: Session) -> None:
    """What is in use stays in use, to both, until it is removed."""
    create_image("i", "qcow2", session=session, options={}, size=MIB)
    with Backend.open("i", session=session, format="qcow2", writable=True) as disk:
        QCOW2.add_bitmap(disk.node, "b", None)
        QCOW2.store_bitmaps(disk.node)
        disk.write(0, b"x")
        disk.flush()
        crashed = Path("i").read_bytes()
    Path("i").write_bytes(crashed)
    assert qemu_bitmaps("i")[0]["flags"] == ["in-use", "auto"]
    qemu_check("i")
    with Backend.open("i", session=session, format="qcow2", writable=True) as disk:
        disk.write(0, b"y")
        with pytest.raises(LaminaError, match="inconsistent"):
            QCOW2.clear_bitmap(disk.node, "b")
    assert qemu_bitmaps("i")[0]["flags"] == ["in-use", "auto"]
    run("qemu-img", "bitmap", "--remove", "i", "b")
    qemu_check("i")


# -- damaged ones ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of QEMU's with two bitmaps, the first of which holds something."""
    path = tmp_path_factory.mktemp("sound") / "i"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    run("qemu-io", "-c", "write 0 100k", path)
    return path.read_bytes()


ROWS: list[tuple[str, int, str, int]] = [
    # Of the header's extension.
    ("extension", -4, "I", 16),
    *(("extension", 0, "I", count) for count in (0, 1, 3, 70000)),
    ("extension", 4, "I", 1),
    *(("extension", 8, "Q", size) for size in (0, 8, 63, 72, 1 << 40)),
    *(("extension", 16, "Q", place) for place in (0, 513, 1 << 40, (1 << 64) - 65536)),
    # Of an entry of the directory: table offset and size, flags, type, granularity, lengths, name.
    *(("entry", 0, "Q", place) for place in (0, 513, 1 << 40, (1 << 64) - 65536)),
    *(("entry", 8, "I", size) for size in (0, 2, 8192, 8193, 0xFFFFFFFF)),
    *(("entry", 12, "I", flags) for flags in (1, 4, 6, 8)),
    *(("entry", 16, "B", kind) for kind in (0, 2)),
    *(("entry", 17, "B", bits) for bits in (8, 31, 32, 63, 255)),
    *(("entry", 18, "H", length) for length in (1, 2000)),
    *(("entry", 20, "I", length) for length in (8, 0xFFFFFFF0)),
    ("entry", 24, "H", int.from_bytes(b"b1", "big")),
    ("entry", 24, "H", 0xFFFE),
    # Of a table.
    *(("table", 0, "Q", word) for word in (1, 2, 1 << 60, 513 << 9, 1 << 40, 0x50001)),
    # The bit that vouches for all of it.
    ("features", 7, "B", 0),
    ("features", 7, "B", 5),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused_in_the_same_words(row: tuple[str, int, str, int], sound: bytes) -> None:
    structure, offset, format, value = row
    image = bytearray(sound)
    extension = sound.index(bytes.fromhex("2385287500000018")) + 8
    (directory,) = struct.unpack_from(">Q", sound, extension + 16)
    (table,) = struct.unpack_from(">Q", sound, directory)
    start = {"extension": extension, "entry": directory, "table": table, "features": 88}[structure]
    struct.pack_into(f">{format}", image, start + offset, value)
    Path("i").write_bytes(image)
    done = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "i"], capture_output=True, check=False
    )
    theirs = done.stderr.decode().strip().removeprefix("qemu-img: Could not open 'i': ")
    told: list[str] = []
    ours = ""
    for inspect in (True, False):
        try:
            with Backend.open(
                "i", session=Session(warn=told.append), format="qcow2", inspect=inspect
            ) as disk:
                for bitmap in disk.node.dirty_bitmaps:
                    list(bitmap.ranges())
        except LaminaError as error:
            ours = str(error)
    if told:
        theirs = theirs.removeprefix("qemu-img: ")
        ours = told[0]
    assert ours == theirs
