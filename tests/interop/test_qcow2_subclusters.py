"""Extended L2 entries and external data files between us and QEMU, in every combination."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.session import Session
from lamina.formats.qcow2 import DRIVER
from tests.interop.test_qcow2_images import Guest, qemu_check, qemu_reads, run, we_read

pytestmark = pytest.mark.peer

KIB, MIB = 1 << 10, 1 << 20
START = "import lamina.tools.{0}, sys; sys.argv[0] = 'qemu-{0}'; sys.exit(lamina.tools.{0}.main())"
IMG = {"theirs": ["qemu-img"], "ours": [sys.executable, "-c", START.format("img")]}
IO = {"theirs": ["qemu-io"], "ours": [sys.executable, "-c", START.format("io")]}


@pytest.fixture
def session() -> Session:
    def refuse(text: str) -> None:
        raise AssertionError(f"unexpected warning: {text}")

    return Session(warn=refuse)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(words: list[str], *arguments: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*words, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.stderr + done.stdout + f"exit {done.returncode}"


def both_say(tools: dict[str, list[str]], *arguments: object) -> str:
    theirs = said(tools["theirs"], *arguments)
    assert said(tools["ours"], *arguments) == theirs
    return theirs


# -- written by both -------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"cluster_size": size, "extended_l2": extended, "data": data, "compression_type": codec}
    for size, extended, data, codec in itertools.product(
        [512, 16 * KIB, 64 * KIB, 2 * MIB], ["off", "on"], ["", "file", "raw"], ["zlib", "zstd"]
    )
    if (extended == "on" and size >= 16 * KIB) or (extended == "off" and data)
]
SAMPLE = random.Random(3).sample(KINDS, 12)


@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_in_turns(number: int, session: Session) -> None:
    """Both write to one image, with an overlay of the same kind where it can be one."""
    kind = dict(SAMPLE[number])
    data = kind.pop("data")
    unit = kind["cluster_size"]
    size = 2 * MIB + 512 * (number % 5)
    content = b""
    for depth in range(1 if data == "raw" else 2):
        image = f"{depth}.qcow2"
        given = dict(kind)
        if data:
            given["data_file"] = f"{depth}.data"
        if data == "raw":
            given["data_file_raw"] = "on"
        if depth:
            given |= {"backing_file": f"{depth - 1}.qcow2", "backing_fmt": "qcow2"}
            if kind["extended_l2"] == "on" and number % 2:
                given["preallocation"] = "metadata"
        create_image(image, "qcow2", session=session, options=given, size=size)
        guest = Guest(size, unit, number + depth, content.ljust(size, b"\0"))
        for _ in range(2):
            with Backend.open(
                image, session=session, format="qcow2", writable=True, discard="unmap"
            ) as disk:
                guest.ours(disk, 12)
                assert disk.read(0, disk.size) == guest.content
            qemu_check(image)
            assert qemu_reads(image) == guest.content
            guest.theirs(image, 12)
            with Backend.open(image, session=session, format="qcow2") as disk:
                assert disk.read(0, disk.size) == guest.content
                found = DRIVER.check(disk.node, Fix(), session.warn)
                assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0)
        if data == "raw":
            assert Path(f"{depth}.data").read_bytes()[:size] == guest.content
        both_say(IMG, "map", "--output=json", image)
        both_say(IMG, "check", image)
        both_say(IMG, "measure", "-O", "qcow2", image)
        content = bytes(guest.content)


def test_subclusters_are_copied_zeroed_and_kept_as_qemu_does(session: Session) -> None:
    """The tables that both leave are the same, word for word."""
    run("qemu-img", "create", "-q", "-f", "raw", "base", "256k")
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 256k", "base")
    commands = (
        "write -P 1 0 1k", "write -P 2 3k 100", "write -z 17k 2k", "write -P 3 48k 16k",
        "discard 48k 1k", "write -z 52k 300", "write -z -u 54k 1k", "write -z 64k 16k",
        "write -P 5 80k 16k", "write -z 80k 16k", "write -P 6 96k 16k", "write -z -u 96k 16k",
        "write -P 7 112k 16k", "discard 112k 16k", "write -P 8 82k 700", "write -P 9 130k 50k",
        "write -z 131k 100", "write -z 190k 20k", "write -P 3 240k 16k", "write -z -u 240k 8k",
        "write -z -u 248k 8k", "write -z 244k 4k", "write -P 1 246k 3k",
    )  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    bitmaps = {}
    for tool, io in IO.items():
        image = f"{tool}.qcow2"
        options = "extended_l2=on,cluster_size=16k"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "-o", options,
            image)
        said(io, "-d", "unmap", *words, image)
        run("qemu-img", "snapshot", "-c", "one", image)
        more = ["-c", "write -P 7 81k 100", "-c", "write -z 131k 1k", "-c", "write -P 6 18k 512"]
        said(io, "-d", "unmap", *more, "-c", "write -P 2 135k 1k", image)
        qemu_check(image)
        content = Path(image).read_bytes()
        l1 = int.from_bytes(content[40:48], "big")
        table = int.from_bytes(content[l1 + 2 : l1 + 8], "big")
        bitmaps[tool] = [
            (
                any(content[at + 1 : at + 8]),
                content[at] >> 7,
                content[at + 8 : at + 16].hex(),
            )
            for at in range(table, table + 16 * 16, 16)
        ]
    assert bitmaps["ours"] == bitmaps["theirs"]
    assert qemu_reads("ours.qcow2") == qemu_reads("theirs.qcow2")


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_snapshots(compression_type: str, session: Session) -> None:
    options = {
        "extended_l2": "on",
        "cluster_size": str(16 * KIB),
        "compression_type": compression_type,
    }
    create_image("s.qcow2", "qcow2", session=session, options=options, size=MIB)
    guest = Guest(MIB, 512, 7)
    states = {}
    for number, name in enumerate(("one", "two", "three")):
        with Backend.open("s.qcow2", session=session, format="qcow2", writable=True) as disk:
            guest.unit = 16 * KIB
            guest.ours(disk, 10)
        tool = IMG["ours" if number % 2 else "theirs"]
        assert said(tool, "snapshot", "-c", name, "s.qcow2") == "exit 0"
        states[name] = bytes(guest.content)
        guest.theirs("s.qcow2", 8)
    qemu_check("s.qcow2")
    assert qemu_reads("s.qcow2") == guest.content
    for name, content in states.items():
        assert qemu_reads("s.qcow2", "-l", f"snapshot.name={name}") == content
    assert said(IMG["ours"], "snapshot", "-d", "two", "s.qcow2") == "exit 0"
    assert said(IMG["ours"], "snapshot", "-a", "one", "s.qcow2") == "exit 0"
    qemu_check("s.qcow2")
    assert we_read("s.qcow2", session) == states["one"]
    guest.content[:] = states["one"]
    guest.theirs("s.qcow2", 8)
    assert we_read("s.qcow2", session) == guest.content


# -- whole images ----------------------------------------------------------------------------------

TARGETS = [
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,preallocation=metadata",
    "data_file=x.data",
    "data_file=x.data,data_file_raw=on",
    "data_file=x.data,extended_l2=on,preallocation=full",
]


@pytest.mark.parametrize("options", TARGETS)
def test_converted_resized_and_measured(options: str, session: Session) -> None:
    guest = Guest(MIB + 1536, 4096, 11)
    for start in range(0, len(guest.content), 150_000):
        guest.content[start : start + 9000] = guest.rng.randbytes(9000)
    size = MIB + 1536
    del guest.content[size:]
    Path("source.raw").write_bytes(guest.content)
    convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "source.raw"]
    for tool in ("theirs", "ours"):
        assert said(IMG[tool], *convert, "x.qcow2") == "exit 0"
        assert we_read("x.qcow2", session) == guest.content
        assert qemu_reads("x.qcow2") == guest.content
    qemu_check("x.qcow2")
    both_say(IMG, "measure", "-f", "raw", "-O", "qcow2", "-o", options, "source.raw")
    compressed = said(IMG["ours"], *convert[:1], "-c", *convert[1:], "c.qcow2")
    assert compressed.endswith("exit 0" if options == TARGETS[0] else "exit 1")
    resizes = [("+300k",), ("--shrink", "400k"), ("--preallocation=metadata", "500k"), ("2M",)]
    said(IMG["ours"], *convert, "x.qcow2")
    content = bytearray(guest.content)
    for *how, new in resizes:
        assert said(IMG["ours"], "resize", "-q", *how, "x.qcow2", new) == "exit 0"
        size = json.loads(run("qemu-img", "info", "--output=json", "x.qcow2"))["virtual-size"]
        content = content[:size].ljust(size, b"\0")
        assert we_read("x.qcow2", session) == content
        assert qemu_reads("x.qcow2") == content
        qemu_check("x.qcow2")
        if "data_file" in options:
            data = Path("x.data").read_bytes()
            assert len(data) >= size
            if "raw" in options:
                assert data[:size] == content


@pytest.mark.parametrize("options", ["extended_l2=on,cluster_size=16k", "data_file=o.data"])
def test_rebased_and_committed(options: str, session: Session) -> None:
    for name, seed in (("base", 1), ("other", 2)):
        run("qemu-img", "create", "-q", "-f", "qcow2", name, "1M")
        Guest(MIB, 4096, seed).theirs(name, 10)
    left = {}
    for tool, img in IMG.items():
        for name in ("base", "other"):
            Path(f"{tool}.{name}").write_bytes(Path(name).read_bytes())
        image = "o.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{tool}.base", "-o",
            options, image)
        guest = Guest(MIB, 4096, 5, we_read(f"{tool}.base", session))
        guest.theirs(image, 10)
        rebased = said(img, "rebase", "-F", "qcow2", "-b", f"{tool}.other", image)
        assert rebased == "exit 0"
        assert qemu_reads(image) == guest.content
        qemu_check(image)
        mapped = run("qemu-img", "map", "--output=json", image)
        committed = said(img, "commit", image)
        assert qemu_reads(f"{tool}.other") == guest.content
        qemu_check(image)
        left[tool] = (mapped.count('"depth": 0'), committed, run("qemu-img", "map", image))
    assert left["ours"][1] == left["theirs"][1]


# -- opening a data file ---------------------------------------------------------------------------


def test_words_about_data_files() -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d.data", "d.qcow2", "128k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "n.qcow2", "128k")
    unnamed = Path("d.qcow2").read_bytes().replace(b"DATA", b"XATA", 1)
    Path("unnamed.qcow2").write_bytes(unnamed)
    Path("d.data").rename("e.data")
    for command in ("check", "map", "info", "measure -O qcow2", "snapshot -l", "snapshot -c s"):
        for image in ("d.qcow2", "unnamed.qcow2"):
            both_say(IMG, *command.split(), image)
    option = "driver=qcow2,file.filename={},{}"
    for image, more in (
        ("d.qcow2", "data-file.filename=e.data"),
        ("d.qcow2", "data-file.driver=raw,data-file.file.filename=e.data"),
        ("d.qcow2", "data-file=foo"),
        ("n.qcow2", "data-file.filename=e.data"),
        ("n.qcow2", "data-file=foo"),
        ("unnamed.qcow2", "data-file.filename=e.data"),
    ):
        for command in ("map", "info", "check"):
            both_say(IMG, command, "--image-opts", option.format(image, more))
    Path("e.data").rename("d.data")
    for command in ("snapshot -c s", "snapshot -a s", "snapshot -d s", "resize --shrink 64k"):
        both_say(IMG, *command.split(), "d.qcow2")
    both_say(IO, "-c", "write -c 0 64k", "d.qcow2")


@pytest.mark.parametrize(
    "name", ["file:d", "json:{}", "nbd:un:x", "", ".", "d/none", 'json:{"driver":"null-co"}']
)
def test_a_stored_name_is_a_path_and_nothing_else(name: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={'d' * 40}", "d.qcow2", "1M")
    content = bytearray(Path("d.qcow2").read_bytes())
    at = content.index(b"DATA")
    content[at + 4 : at + 48] = len(name).to_bytes(4, "big") + name.encode().ljust(40, b"\0")
    if len(name) <= 32:
        # Extensions are as long as they say.
        rest = content[at + 48 : at + 4096]
        start = at + 8 + -(-len(name) // 8) * 8
        content[start : start + len(rest)] = rest
    Path("d.qcow2").write_bytes(content)
    Path("d").touch()
    both_say(IO, "-c", "read 0 512", "d.qcow2")
    both_say(IMG, "info", "d.qcow2")


def test_the_data_file_is_locked_as_qemu_does() -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d.data", "d.qcow2", "1M")
    inode = os.stat("d.data").st_ino
    for arguments in ((), ("-r",)):
        held = {}
        for tool, words in IO.items():
            with subprocess.Popen(
                [*words, *arguments, "d.qcow2"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("read 0 512\n")
                process.stdin.flush()
                while "ops/sec" not in process.stdout.readline():
                    assert process.poll() is None
                locks = Path("/proc/locks").read_text().splitlines()
                mine = [line.split() for line in locks if f":{inode} " in line]
                held[tool] = sorted(
                    byte
                    for line in mine
                    for byte in range(int(line[-2]), int(line[-1]) + 1)
                )
                process.stdin.write("quit\n")
        assert held["ours"] == held["theirs"], arguments
