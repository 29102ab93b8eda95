"""VHD between us, QEMU, dissect.hypervisor, and libvhdi, which knows differencing images."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.extents import Kind
from lamina.block.policy import Policy
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import ImageCorrupt, Refused, UsageError
from lamina.formats.vpc.layout import parse_footer
from tests.interop.exchange import exercise, exercise_theirs, opened, run, same
from tests.interop.samples import sample

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
]

SIZE = 6 << 20
KINDS = {
    "dynamic": {},
    "dynamic-exact": {"force_size": "on"},
    "fixed": {"subformat": "fixed"},
    "fixed-exact": {"subformat": "fixed", "force_size": "on"},
}


def create(image: Path, size: int | None = SIZE, **options: str) -> None:
    create_image(str(image), "vpc", session=Session(), options=options, size=size)


def size_of(image: Path) -> int:
    with opened(image, "vpc", writable=False) as disk:
        return disk.size


def checked(image: Path) -> None:
    lines: list[str] = []
    with opened(image, "vpc", writable=False, check=True) as disk:
        driver("vpc").check(disk.node, Fix(), lines.append)
    assert lines == []


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_ways(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image.vhd"
    create(image, **KINDS[kind])
    content = bytearray(size_of(image))
    rng = random.Random(kind)
    exercise(image, "vpc", content, rng)
    same(image, "vpc", content)
    exercise_theirs(image, "vpc", content, rng)
    exercise(image, "vpc", content, rng)
    same(image, "vpc", content)
    checked(image)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [0, 512, SIZE + 512, 3 << 30])
def test_same_bytes_as_qemu(tmp_path: Path, kind: str, size: int) -> None:
    """But for the time and the unique id."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create(ours, size, **KINDS[kind])
    given = ["-o", ",".join(f"{k}={v}" for k, v in KINDS[kind].items())] if KINDS[kind] else []
    run("qemu-img", "create", "-q", "-f", "vpc", *given, theirs, size)
    assert ours.stat().st_size == theirs.stat().st_size
    images = []
    for path in (ours, theirs):
        with path.open("rb") as file:
            file.seek(-512, 2)
            footer = parse_footer(file.read())
            file.seek(0)
            head = bytearray(file.read(1 << 16))
        assert footer.timestamp > 24 * 365 * 86400
        for copy in range(0, len(head), 512):
            if head[copy : copy + 8] == b"conectix":
                head[copy + 24 : copy + 28] = bytes(4)
                head[copy + 64 : copy + 84] = bytes(20)
        fields = [footer.current_size, footer.geometry, footer.creator, footer.disk_type]
        images.append((fields, footer.data_offset, head))
    assert images[0] == images[1]


@pytest.mark.parametrize("kind", ["dynamic-exact", "fixed-exact"])
@pytest.mark.parametrize("size", [1 << 20, 40 << 20, SIZE - 512])
def test_qemu_reads_what_was_resized(tmp_path: Path, kind: str, size: int) -> None:
    image = tmp_path / "image.vhd"
    content = bytearray(SIZE)
    create(image, **KINDS[kind])
    exercise(image, "vpc", content, random.Random(size))
    with opened(image, "vpc", resize=True) as disk:
        disk.truncate(size)
    checked(image)
    same(image, "vpc", content[:size] + bytes(max(size - SIZE, 0)))
    assert size_of(image) == size


def test_sizes_for_azure(tmp_path: Path) -> None:
    """A fixed disk of whole megabytes, a footer behind, and nothing else."""
    image = tmp_path / "image.vhd"
    create(image, 5 << 20, subformat="fixed", force_size="on")
    assert image.stat().st_size == (5 << 20) + 512
    footer = parse_footer(image.read_bytes()[-512:])
    assert footer.current_size == footer.original_size == 5 << 20


# -- images of others ------------------------------------------------------------------------------

SAMPLES = {
    "virtualpc-dynamic.vhd": 136363130880,
    "hyperv2012r2-dynamic.vhd": 136365211648,
    "d2v-zerofilled.vhd": 263454720,
}


@pytest.mark.parametrize("name", list(SAMPLES))
def test_samples(tmp_path: Path, name: str) -> None:
    """Found sound, the same data as QEMU finds, and written to so that QEMU can read it."""
    image = tmp_path / "image.vhd"
    image.write_bytes(sample(name))
    assert size_of(image) == SAMPLES[name]
    checked(image)
    raw = tmp_path / "theirs.raw"
    run("qemu-img", "convert", "-f", "vpc", "-O", "raw", image, raw)
    with opened(image, "vpc", writable=False) as disk, opened(raw, "raw", writable=False) as peer:
        for extent in disk.node.extents(0, disk.size):
            if extent.kind is Kind.DATA:
                step = min(extent.length, 1 << 20)
                assert disk.read(extent.guest_offset, step) == peer.read(extent.guest_offset, step)
    with opened(image, "vpc") as disk:
        disk.write(100 << 20, b"written here" * 1000)
    checked(image)
    run("qemu-io", "-f", "vpc", "-r", "-c", "read -P 0x77 100M 1", image)


def test_a_sample_that_asks_for_too_much(tmp_path: Path) -> None:
    image = tmp_path / "image.vhd"
    image.write_bytes(sample("afl5.img"))
    with pytest.raises(ImageCorrupt, match=r"Max Table Entries too large \(1073741825\)"):
        size_of(image)


# -- differencing images ---------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, bytearray]:
    """A parent in a directory of its own, a child, and what the child reads as."""
    (tmp_path / "parents").mkdir()
    parent, child = tmp_path / "parents" / "parent.vhd", tmp_path / "child.vhd"
    create(parent)
    content = bytearray(size_of(parent))
    exercise(parent, "vpc", content, random.Random(1), 10)
    create(child, None, backing_file="parents/parent.vhd", backing_fmt="vpc")
    return parent, child, content


def second_reader(parent: Path, child: Path) -> bytes:
    """What libvhdi finds in the child of a parent."""
    import pyvhdi

    below, above = pyvhdi.file(), pyvhdi.file()
    below.open(str(parent))
    above.open(str(child))
    assert above.get_parent_identifier() == below.get_identifier()
    assert above.get_parent_filename() == parent.name
    above.set_parent(below)
    found = bytearray()
    while len(found) < above.get_media_size():
        found += above.read_buffer(min(1 << 20, above.get_media_size() - len(found)))
    above.close()
    below.close()
    return bytes(found)


def test_dissect_reads_dynamic_and_fixed_disks(tmp_path: Path) -> None:
    from dissect.hypervisor.disk.vhd import VHD

    for kind, options in KINDS.items():
        image = tmp_path / kind
        create(image, **options)
        content = bytearray(size_of(image))
        exercise(image, "vpc", content, random.Random(kind), 10)
        with image.open("rb") as file:
            assert VHD(file).read(len(content)) == content


def test_children_read_and_write(family: tuple[Path, Path, bytearray]) -> None:
    parent, child, content = family
    before = parent.read_bytes()
    exercise(child, "vpc", content, random.Random(2))
    assert parent.read_bytes() == before
    checked(child)
    assert second_reader(parent, child) == content


def test_children_are_committed(family: tuple[Path, Path, bytearray]) -> None:
    from lamina.jobs.commit import commit, empty, writable_layer

    parent, child, content = family
    exercise(child, "vpc", content, random.Random(3))
    with opened(child, "vpc") as disk:
        below = disk.node.backing
        assert below is not None
        with writable_layer(disk, below) as base:
            commit(disk, base)
        empty(disk)
        assert disk.read(0, len(content)) == content
    same(parent, "vpc", content)
    checked(child)
    assert child.stat().st_size < 8192


@pytest.mark.parametrize("kind", list(KINDS))
def test_children_are_rebased(family: tuple[Path, Path, bytearray], kind: str) -> None:
    """Safely: what differs is copied."""
    parent, child, content = family
    exercise(child, "vpc", content, random.Random(4), 10)
    other = parent.with_name("other.vhd")
    create(other, len(content), **KINDS[kind])
    exercise(other, "vpc", bytearray(len(content)), random.Random(kind), 10)
    run("lamina-img", "rebase", "-f", "vpc", "-b", "parents/other.vhd", "-F", "vpc", child)
    parent.unlink()
    checked(child)
    with opened(child, "vpc", writable=False) as disk:
        assert disk.read(0, len(content)) == content
    assert second_reader(other, child) == content


def test_children_become_whole(family: tuple[Path, Path, bytearray]) -> None:
    """Rebased to nothing: QEMU, which knows no parents, and a reader that believes the bitmaps."""
    import pyvhdi

    parent, child, content = family
    exercise(child, "vpc", content, random.Random(6), 10)
    run("lamina-img", "rebase", "-f", "vpc", "-b", "", child)
    parent.unlink()
    checked(child)
    same(child, "vpc", content)
    reader = pyvhdi.file()
    reader.open(str(child))
    assert reader.read_buffer(len(content)) == content
    reader.close()
    with opened(child, "vpc", writable=False) as disk:
        assert disk.info().backing_filename is None
    exercise(child, "vpc", content, random.Random(7), 10)
    exercise_theirs(child, "vpc", content, random.Random(8))
    checked(child)


def test_parents_that_cannot_be_had(family: tuple[Path, Path, bytearray]) -> None:
    """Known before anything is copied."""
    parent, child, _ = family
    raw = parent.with_name("raw")
    raw.write_bytes(bytes(SIZE))
    other = parent.with_name("other.vhd")
    create(other)
    before = parent.read_bytes(), child.read_bytes()
    for image, format, name, words in (
        (child, "raw", raw, "must be one as well"),
        (parent, "vpc", other, "cannot gain one"),
    ):
        said = run(
            *("lamina-img", "rebase", "-f", "vpc", "-b", name, "-F", format, image), status=1
        )
        assert words in said
    assert (parent.read_bytes(), child.read_bytes()) == before


def test_children_whose_parent_moved(family: tuple[Path, Path, bytearray]) -> None:
    """Unsafely: the parent itself under another name, and another one for the same content."""
    parent, child, content = family
    exercise(child, "vpc", content, random.Random(5), 10)
    copy = child.with_name("copy.vhd")
    run("lamina-img", "convert", "-O", "vpc", "-o", "force_size=on", parent, copy)
    moved = parent.rename(child.with_name("moved.vhd"))
    for other in (moved, copy, moved):
        run("lamina-img", "rebase", "-u", "-f", "vpc", "-b", other.name, "-F", "vpc", child)
        checked(child)
        with opened(child, "vpc", writable=False) as disk:
            assert disk.read(0, len(content)) == content
            assert disk.info().backing_filename == other.name
        assert second_reader(other, child) == content
    said = run(
        "lamina-img", "rebase", "-u", "-f", "vpc", "-b", "gone.vhd", "-F", "vpc", child, status=1
    )
    assert "gone.vhd" in said


def test_parents_pass_the_opening_policy(family: tuple[Path, Path, bytearray]) -> None:
    parent, child, _ = family
    moved = child.parent / "elsewhere"
    moved.mkdir()
    shutil.copy(child, moved / "child.vhd")
    with pytest.raises(Refused):
        opened_with(child, Policy.DENY)
    opened_with(child, Policy.BESIDE)
    shutil.copytree(parent.parent, moved / "parents")
    opened_with(moved / "child.vhd", Policy.BESIDE)
    (moved / "parents" / "parent.vhd").unlink()
    (moved / "parents" / "parent.vhd").symlink_to(parent)
    with pytest.raises(Refused):
        opened_with(moved / "child.vhd", Policy.BESIDE)


def opened_with(image: Path, policy: Policy) -> None:
    from lamina.block.backend import Backend

    Backend.open(str(image), session=Session(policy=policy), format="vpc").close()


def test_what_cannot_be_a_parent(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    with pytest.raises(UsageError, match="must be a VHD image"):
        create(tmp_path / "a.vhd", None, backing_file="raw", backing_fmt="raw")
    create(tmp_path / "p.vhd")
    with pytest.raises(UsageError, match="has no backing file"):
        create(
            tmp_path / "a.vhd", None, backing_file="p.vhd", backing_fmt="vpc", subformat="fixed"
        )
    assert not (tmp_path / "a.vhd").exists()
