"""Damaged qcow2 images in use: the same words, the same refusals, the same bytes as with QEMU."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer

COPIED = 1 << 63
START = "import lamina.tools.io, sys; sys.argv[0] = 'qemu-io'; sys.exit(lamina.tools.io.main())"
LAMINA = [sys.executable, "-c", START]
TOOLS = {"theirs": ["qemu-io"], "ours": LAMINA}

# The image: 64 KiB clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1 table, 4 L2 table,
# 5 and 6 data of the guest clusters 0 and 1.
REFTABLE, REFBLOCK, L1, L2, DATA = (cluster << 16 for cluster in (1, 2, 3, 4, 5))


def image(name: str, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, name, "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 128k", name], check=True, capture_output=True)
    return Path(name)


def poke(path: Path, offset: int, value: int, size: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(size, "big"))


def session(tool: str, path: Path, commands: list[str], *options: str) -> str:
    words = [*TOOLS[tool], *options]
    for command in commands:
        words += ["-c", command]
    # Buffered, as programs in C are: what goes to standard error comes first.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*words, str(path)], capture_output=True, text=True, env=environment, check=False
    )
    said = done.stderr + done.stdout + f"exit {done.returncode}\n"
    said = re.sub(r"\d\d\.\d\d sec.*", "", said).replace(str(path), "IMAGE")
    return re.sub(r"(?m)^.* ops; *$\n", "", said)


WRITES = ["write -P 2 0 4k", "write -P 3 1M 64k", "read 0 4k", "flush"]
READS = ["read -P 1 0 4k", "read -P 1 64k 64k", "read 1M 64k"]

DAMAGE: dict[str, tuple[int, int, list[str], tuple[str, ...]]] = {
    "data in the L1 table": (L2, COPIED | L1, WRITES, ()),
    "data in the header": (L2 + 8, COPIED | 0x10000 * 0 + 0x10000, ["write 64k 64k"], ()),
    "data in the refcount table": (L2, COPIED | REFTABLE, WRITES, ()),
    "data in the refcount block": (L2, COPIED | REFBLOCK, WRITES, ()),
    "data in an L2 table": (L2, COPIED | L2, WRITES, ()),
    "data not aligned, read": (L2, COPIED | DATA + 512, READS, ()),
    "data not aligned, only read": (L2, COPIED | DATA + 512, READS, ("-r",)),
    "data not aligned, written": (L2, COPIED | DATA + 512, WRITES, ()),
    "zero cluster not aligned": (L2, COPIED | DATA + 512 | 1, READS, ()),
    "zero cluster not aligned, only read": (L2, COPIED | DATA + 512 | 1, READS, ("-r",)),
    "L2 table not aligned": (L1, COPIED | L2 + 512, READS, ()),
    "L2 table not aligned, only read": (L1, COPIED | L2 + 512, READS, ("-r",)),
    "L2 table not aligned, written": (L1, COPIED | L2 + 512, WRITES, ()),
    "refcount block not aligned": (REFTABLE, REFBLOCK + 512, WRITES[1:], ()),
    "refcount block behind the end": (REFTABLE, 1 << 40, WRITES[1:], ()),
    "refcount block in the L1 table": (REFTABLE, L1, WRITES[1:], ()),
    "all clusters free": (REFBLOCK, 0, ["write 1M 64k"], ()),
    "L1 table free": (REFBLOCK + 4, 0, ["write 1M 64k"], ()),
    "L2 table free": (REFBLOCK + 8, 1 << 48, ["write 1M 64k", "write 2M 128k"], ()),
    "data behind the end": (L2, COPIED | 1 << 40, ["read -P 0 0 4k"], ("-r",)),
    "corrupt bit": (72, 2, WRITES, ()),
    "corrupt bit, only read": (72, 2, READS, ("-r",)),
    "unknown incompatible bit": (72, 1 << 40, READS, ()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_as_qemu_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    offset, value, commands, options = DAMAGE[name]
    said, left = {}, {}
    for tool in TOOLS:
        path = image(f"{tool}.qcow2")
        poke(path, offset, value)
        said[tool] = session(tool, path, commands, "-f", "qcow2", *options)
        header = path.read_bytes()[:112]
        left[tool] = struct.unpack_from(">QQQ", header, 72)
    assert said["ours"] == said["theirs"]
    assert left["ours"] == left["theirs"]


@pytest.mark.parametrize(
    ("offset", "value"), [(REFTABLE, 0), (L1, COPIED | REFBLOCK), (L1, COPIED | L1)]
)
def test_refused_in_other_words(
    offset: int, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two structures in one place: which of them is named depends on who looks first."""
    monkeypatch.chdir(tmp_path)
    for tool in TOOLS:
        path = image(f"{tool}.qcow2")
        poke(path, offset, value)
        said = session(tool, path, ["write 1M 64k"], "-f", "qcow2")
        assert "Marking image as corrupt: Preventing invalid" in said
        assert "write failed: Input/output error" in said


# The same with clusters of 16 KiB and extended L2 entries: two words for each guest cluster.
EXTENDED = ("-o", "extended_l2=on,cluster_size=16k")
PAIRS = 4 << 14
PLACE = COPIED | 5 << 14
SMALL_READS = ["read 0 512", "read -P 1 16k 512", "read 1M 512"]
SMALL_WRITES = ["write -P 2 512 512", "write -P 2 8k 512", "read -P 1 0 512"]
BITMAPS: dict[str, tuple[int, int, list[str]]] = {
    "both bits": (PLACE, 0x10000FFFF, SMALL_READS),
    "both bits, written": (PLACE, 0x10000FFFF, SMALL_WRITES),
    "both bits, of others": (PLACE, 0x80000000FFFFFFFF, SMALL_READS),
    "both bits, zeroed": (PLACE, 0x10000FFFF, ["write -z 0 512", "read -P 0 0 512"]),
    "both bits, discarded": (PLACE, 0x10000FFFF, ["discard 0 16k", "read -P 0 0 512"]),
    "no place": (0, 1, SMALL_READS),
    "no place, written": (0, 1, SMALL_WRITES),
    "no place, zeroes": (0, 3 << 32, [*SMALL_READS, *SMALL_WRITES[:2], "read -P 0 0 512"]),
    "zero flag": (PLACE | 1, 0xFFFF, [*SMALL_READS, *SMALL_WRITES]),
    "not aligned": (PLACE | 512, 0xFFFF, SMALL_READS),
    "not aligned, written": (PLACE | 512, 0xFFFF, SMALL_WRITES),
    "not aligned, all zero": (PLACE | 512, 0xFFFFFFFF << 32, SMALL_READS),
    "in the L1 table": (COPIED | 3 << 14, 0xFFFF, SMALL_WRITES),
}


@pytest.mark.parametrize("name", BITMAPS)
@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writable", "only read"])
def test_extended_entries(
    name: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry, bitmap, commands = BITMAPS[name]
    said, left = {}, {}
    for tool in TOOLS:
        path = image(f"{tool}.qcow2", *EXTENDED)
        poke(path, PAIRS, entry)
        poke(path, PAIRS + 8, bitmap)
        said[tool] = session(tool, path, commands, "-f", "qcow2", "-d", "unmap", *options)
        left[tool] = struct.unpack_from(">QQQ", path.read_bytes(), 72)
    assert said["ours"] == said["theirs"]
    assert left["ours"] == left["theirs"]


ELSEWHERE: dict[str, tuple[int, list[str]]] = {
    "another place": (COPIED | 0x30000, ["read 64k 512", "read -P 1 0 512"]),
    "compressed": (1 << 62 | 0x10000, ["read 64k 512", "write 64k 512", "read -P 1 0 512"]),
    "not ours": (0x10000, ["read -P 1 64k 512", "write -P 3 64k 512", "read -P 3 64k 512"]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writable", "only read"])
def test_entries_of_a_data_file(
    name: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry, commands = ELSEWHERE[name]
    said = {}
    for tool in TOOLS:
        path = image(f"{tool}.qcow2", "-o", f"data_file={tool}.data")
        poke(path, L2 + 8, entry)
        said[tool] = session(tool, path, commands, "-f", "qcow2", *options)
    assert said["ours"] == said["theirs"]


def version_2_zero(path: Path) -> None:
    poke(path, L2, DATA | COPIED | 1)


def shared_table(path: Path) -> None:
    """A second L1 entry names the same L2 table, which nobody can know."""
    poke(path, L1 + 8, COPIED | L2)


@pytest.mark.parametrize(
    ("options", "damage", "commands"),
    [
        (("-o", "compat=0.10"), version_2_zero, READS),
        (("-o", "compat=0.10"), version_2_zero, WRITES),
        ((), shared_table, ["read -P 1 512M 64k"]),
    ],
)
def test_more_damage(
    options: tuple[str, ...],
    damage: Callable[[Path], None],
    commands: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {}
    for tool in TOOLS:
        path = image(f"{tool}.qcow2", *options)
        damage(path)
        said[tool] = session(tool, path, commands, "-f", "qcow2")
    assert said["ours"] == said["theirs"]


@pytest.mark.parametrize(
    ("checks", "caught"),
    [
        ("overlap-check=none", False),
        ("overlap-check=constant", True),
        ("overlap-check=constant,overlap-check.active-l1=off", False),
        ("overlap-check.template=none,overlap-check.active-l1=on", True),
        ("overlap-check=all", True),
    ],
)
def test_what_is_watched_is_an_option(
    checks: str, caught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {}
    for tool in TOOLS:
        path = image(f"{tool}.qcow2")
        # The last sector of the cluster is not used by the table.
        poke(path, L2, COPIED | L1)
        poke(path, L1 + 65528, 0)
        options = f"driver=qcow2,file.filename={path},{checks}"
        words = [*TOOLS[tool], "-c", "write -P 9 60k 4k", "--image-opts", options]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        said[tool] = "Preventing invalid write" in done.stderr
        assert (done.returncode != 0) == caught
    assert said == {"ours": caught, "theirs": caught}


SETTINGS = [
    "cache-size=1M,l2-cache-size=1M,refcount-cache-size=1M",
    "cache-size=1M,l2-cache-size=2M",
    "cache-size=1M,refcount-cache-size=2M",
    "l2-cache-entry-size=100",
    "l2-cache-entry-size=4097",
    "l2-cache-entry-size=128k",
    "l2-cache-entry-size=4096",
    "l2-cache-size=1,refcount-cache-size=0",
    "cache-size=0",
    "refcount-cache-size=9E",
    "overlap-check=foo",
    "overlap-check.template=foo",
    "overlap-check=all,overlap-check.template=none",
    "overlap-check.main-header=maybe",
    "overlap-check.foo=on",
    "cache-clean-interval=-1",
    "cache-clean-interval=99999999999",
    "lazy-refcounts=foo",
    "lazy-refcounts=on",
    "pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on",
    "discard-no-unref=on",
    "encrypt.format=aes",
]


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_settings(compat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = image("image.qcow2", "-o", f"compat={compat}")
    for settings in SETTINGS:
        said = {}
        for tool in TOOLS:
            options = f"driver=qcow2,file.filename={path},{settings}"
            words = [*TOOLS[tool], "-c", "read -P 1 0 128k", "--image-opts", options]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            said[tool] = (done.stderr, done.returncode, done.stdout.split("\n")[0])
        assert said["ours"] == said["theirs"], settings
