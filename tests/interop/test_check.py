"""Beside qemu-img check: the same findings, lines and figures, and repairs that it agrees with."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.driver import CheckResult, Fix
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import LaminaError
from lamina.formats.qcow2.layout import COPIED
from tests.unit.qcow2_check.damage import ALL, DAMAGES, LEAKS, NOTHING, Damage, Image, damaged

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
]

FIELDS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check_errors": "check-errors",
    "corruptions_fixed": "corruptions-fixed",
    "leaks_fixed": "leaks-fixed",
    "image_end_offset": "image-end-offset",
    "total_clusters": "total-clusters",
    "allocated_clusters": "allocated-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "compressed_clusters": "compressed-clusters",
}

Found = tuple[dict[str, int], list[str]]


def qemu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def qemu_check(path: Path, fix: Fix) -> Found:
    """QEMU's figures and lines; without figures if it gave up."""
    repair = ["-r", "all"] if fix.errors else ["-r", "leaks"] if fix.leaks else []
    run = qemu("qemu-img", "check", "-f", "qcow2", "--output=json", *repair, str(path))
    lines = [line for line in run.stderr.splitlines() if not line.startswith("qemu-img:")]
    try:
        value = json.loads(run.stdout)
    except ValueError:
        return {}, lines
    return {ours: value.get(theirs, 0) for ours, theirs in FIELDS.items()}, lines


def our_check(path: Path, fix: Fix, session: Session | None = None, **options: str) -> Found:
    """The same of ours, double checking after a repair as the tool does."""
    lines: list[str] = []
    check = driver("qcow2").check
    with Backend.open(
        str(path),
        session=session or Session(),
        format="qcow2",
        check=True,
        writable=fix != NOTHING,
        options=options,
    ) as image:
        try:
            result = check(image.node, fix, lines.append)
            if result.corruptions_fixed or result.leaks_fixed:
                first, result = result, check(image.node, NOTHING, lines.append)
                result.corruptions_fixed = first.corruptions_fixed
                result.leaks_fixed = first.leaks_fixed
        except LaminaError:
            return {}, lines
    return figures(result), lines


def figures(result: CheckResult) -> dict[str, int]:
    return {name: getattr(result, name) for name in FIELDS}


def both(path: Path, fix: Fix) -> tuple[Found, Found]:
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    return our_check(path, fix), qemu_check(copy, fix)


BETTER = {
    "zero flag in version 2": "QEMU finds it when it reads the cluster, not when it checks",
    "refcount block unaligned": "QEMU cannot compare without the block",
    "refcount block behind the end": "QEMU cannot read at such an offset",
    "L1 names itself": "QEMU finds no fault with it",
    "refcount table on the L1 table": "QEMU cannot read the blocks it names",
    "refcount table on the L2 table": "QEMU cannot read the blocks it names",
    "L2 table unaligned": "QEMU takes what lies there for a table",
    "refcount block reserved bits": "as it should be",
}
"""Where we say more than QEMU."""


@pytest.mark.parametrize(
    "damage",
    [damage for damage in DAMAGES if damage.name not in BETTER],
    ids=lambda damage: damage.name.replace(" ", "-"),
)
def test_the_same_findings(damage: Damage, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(damaged(damage))
    ours, theirs = both(path, NOTHING)
    assert ours[1] == theirs[1]
    assert ours[0] == theirs[0]


SAME_REPAIR = (
    "leak",
    "data too high",
    "data not counted",
    "L2 table not counted",
    "header not counted",
    "refcount block not counted",
    "compressed too low",
    "one place twice",
    "data lies on the L2 table",
    "data lies on the refcount table",
    "COPIED missing",
    "COPIED missing in L1",
    "zero unaligned",
    "refcount block twice",
    "dirty",
    "corrupt",
)
"""What QEMU repairs as well."""


@pytest.mark.parametrize("fix", [LEAKS, ALL], ids=["leaks", "all"])
@pytest.mark.parametrize("name", SAME_REPAIR)
def test_the_same_repair(name: str, fix: Fix, tmp_path: Path) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.name == name)
    path = tmp_path / "image"
    path.write_bytes(damaged(damage))
    ours, theirs = both(path, fix)
    assert ours[1] == theirs[1]
    for found in (ours[0], theirs[0]):
        # A refcount structure that is built anew need not lie in the same place.
        found.pop("image_end_offset", None)
    assert ours[0] == theirs[0]


@pytest.mark.parametrize(
    "damage",
    [damage for damage in DAMAGES if damage.repairable],
    ids=lambda damage: damage.name.replace(" ", "-"),
)
def test_qemu_agrees_with_the_repair(damage: Damage, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(damaged(damage))
    our_check(path, ALL)
    run = qemu("qemu-img", "check", "-f", "qcow2", str(path))
    assert run.returncode == 0, run.stderr


LEFT_BY_QEMU = (
    "COPIED on compressed",
    "data unaligned",
    "data unaligned in version 2",
    "data behind the end",
    "data cut off",
    "compressed behind the end",
    "reserved bits",
    "reserved bits in L1",
    "L2 table unaligned",
    "L2 table behind the end",
    "L1 names itself",
    "L2 table is the refcount block",
    "refcount block unaligned",
    "refcount block reserved bits",
    "zero flag in version 2",
)
"""What QEMU finds again after its repair, or stumbles over; of ours nothing is left."""


@pytest.mark.parametrize(
    "damage",
    [damage for damage in DAMAGES if damage.repairable],
    ids=lambda damage: damage.name.replace(" ", "-"),
)
def test_the_content_is_what_qemus_repair_leaves(damage: Damage, tmp_path: Path) -> None:
    """Whatever QEMU repairs reads the same after our repair."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.write_bytes(damaged(damage))
    our_check(ours, ALL)
    qemu_check(theirs, ALL)
    left = any(
        qemu("qemu-img", command, "--output=json", "-f", "qcow2", str(theirs)).returncode
        for command in ("check", "map")
    )
    assert left == (damage.name in LEFT_BY_QEMU)
    if not left:
        run = qemu("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(ours), str(theirs))
        assert run.returncode == 0, run.stdout


def create(path: Path, options: str, *commands: str, size: str = "1M") -> None:
    assert qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), size)
    arguments = [part for command in commands for part in ("-c", command)]
    run = qemu("qemu-io", "-f", "qcow2", *arguments, str(path))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_every_width(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, f"refcount_bits={bits},cluster_size=4k", "write 0 300k", "write -c 300k 64k")
    ours, theirs = both(path, NOTHING)
    assert ours == theirs
    image = Image(path.read_bytes())
    image.put(image.entry(3), image.get(image.entry(2)))
    path.write_bytes(image.content)
    ours, theirs = both(path, ALL)
    assert ours == theirs


FRAGMENTS = [
    ("write 0 64k", "write 128k 64k"),
    ("write 256k 64k", "write 128k 64k", "write 0 64k"),
    ("write 0 64k", "write 128k 64k", "write 64k 64k"),
    ("write 0 192k", "write -z 64k 64k"),
    ("write 0 192k", "discard 64k 64k"),
    ("write 0 64k", "write 1G 64k", "write 64k 64k"),
    ("write 0 64k", "write -c 64k 64k", "write 128k 64k"),
    ("write -c 0 64k", "write -c 640k 64k"),
]


@pytest.mark.parametrize("commands", FRAGMENTS)
def test_statistics(commands: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, "compat=1.1", *commands, size="2G")
    ours, theirs = both(path, NOTHING)
    assert ours == theirs


def snapshot_offset(image: Image) -> int:
    return image.get(64)


def snapshot_l1(image: Image) -> int:
    return image.get(snapshot_offset(image))


SNAPSHOTS: list[tuple[str, Callable[[Image], object]]] = [
    ("sound", lambda i: None),
    ("L1 unaligned", lambda i: i.put(snapshot_offset(i), snapshot_l1(i) + 512)),
    ("L1 behind the end", lambda i: i.put(snapshot_offset(i), 1 << 30)),
    ("L1 too large", lambda i: i.change(snapshot_offset(i) + 8, set=1 << 60)),
    ("L1 entry reserved", lambda i: i.change(snapshot_l1(i), set=1)),
    ("L2 entry unaligned", lambda i: i.change(i.get(snapshot_l1(i)) & ~COPIED, set=512)),
    ("table behind the end", lambda i: i.put(64, 1 << 30)),
    ("one entry more", lambda i: i.change(56, clear=3, set=2)),
    ("none", lambda i: i.change(56, clear=3)),
    ("no extra data", lambda i: i.change(snapshot_offset(i) + 32, clear=0xFF)),
]


@pytest.mark.parametrize(
    "change", [change for _, change in SNAPSHOTS], ids=[name for name, _ in SNAPSHOTS]
)
def test_snapshots(change: Callable[[Image], object], tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, "cluster_size=4k", "write 0 100k")
    assert qemu("qemu-img", "snapshot", "-c", "one", str(path)).returncode == 0
    assert qemu("qemu-io", "-f", "qcow2", "-c", "write 0 8k", str(path)).returncode == 0
    image = Image(path.read_bytes())
    change(image)
    path.write_bytes(image.content)
    ours, theirs = both(path, NOTHING)
    assert ours == theirs


def test_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, "cluster_size=4k", "write 0 100k")
    for name in ("b0", "b1"):
        assert qemu("qemu-img", "bitmap", "--add", str(path), name).returncode == 0
    assert qemu("qemu-io", "-f", "qcow2", "-c", "write 0 8k", str(path)).returncode == 0
    ours, theirs = both(path, NOTHING)
    assert ours == theirs
    assert ours[0]["leaks"] == 0


def test_encryption_header(tmp_path: Path) -> None:
    """The LUKS header is counted."""
    path = tmp_path / "image"
    run = qemu(
        "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc",
        "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", str(path), "1M",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    session = Session()
    session.secrets.add("s", b"abc")
    found, lines = our_check(path, NOTHING, session, **{"encrypt.key-secret": "s"})
    assert lines == []
    assert found["corruptions"] == found["leaks"] == 0


EXTENDED: list[Callable[[Image], object]] = [
    lambda i: None,
    lambda i: i.change(i.entry(1), set=1 << 32),
    lambda i: (i.put(i.entry(4), 0), i.put(i.entry(5), 1)),
    lambda i: i.change(i.entry(0), set=512),
    lambda i: (i.change(i.entry(0), set=512), i.put(i.entry(1), 0xFFFFFFFF << 32)),
    lambda i: i.change(i.entry(0), set=1),
]


@pytest.mark.parametrize("change", EXTENDED, ids=range(len(EXTENDED)))
def test_extended_l2(change: Callable[[Image], object], tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, "extended_l2=on", "write 0 128k", "write -z 300k 4k")
    image = Image(path.read_bytes())
    change(image)
    path.write_bytes(image.content)
    ours, theirs = both(path, NOTHING)
    assert ours == theirs
    assert our_check(path, ALL)[0]["corruptions"] == 0
    assert qemu("qemu-img", "check", "-f", "qcow2", str(path)).returncode == 0


def test_external_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    data = tmp_path / "data"
    create(path, f"data_file={data}", "write 0 128k", "write -z 256k 64k")
    ours, theirs = both(path, NOTHING)
    assert ours == theirs
    image = Image(path.read_bytes())
    image.change(image.entry(1), clear=COPIED)
    image.put(image.entry(2), 1 << 62 | 0x50000)
    path.write_bytes(image.content)
    ours, theirs = both(path, NOTHING)
    assert ours == theirs


def random_damage(image: Image, rng: random.Random) -> None:
    """Change a few table entries."""
    places = [image.l1, image.table, *(image.entry(index) for index in range(20))]
    for _ in range(rng.randrange(1, 4)):
        place, bit = rng.choice(places), 1 << rng.randrange(64)
        match rng.randrange(3):
            case 0:
                image.change(place, set=bit)
            case 1:
                image.change(place, clear=bit)
            case _:
                image.put(place, rng.randrange(14) << 12 | COPIED)


@pytest.mark.parametrize("seed", range(25))
def test_random_damage_is_repaired_to_qemus_content(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "image"
    image = Image(damaged(DAMAGES[0]))
    random_damage(image, rng)
    path.write_bytes(image.content)
    found, lines = our_check(path, ALL)
    assert found["corruptions"] == found["leaks"] == 0, lines
    run = qemu("qemu-img", "check", "-f", "qcow2", str(path))
    assert run.returncode == 0, run.stderr
    with Backend.open(str(path), session=Session(), format="qcow2") as opened:
        content = opened.node.read(0, opened.size)
    raw = tmp_path / "raw"
    run = qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw))
    assert run.returncode == 0, run.stderr
    assert raw.read_bytes() == content
