"""VMDK between us and QEMU; and read by libvmdk, which tells what QEMU does not know."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.block.creation import create_image
from lamina.block.driver import Fix
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import LaminaError
from lamina.formats.vmdk.descriptor import ExtentLine, compose
from tests.interop.exchange import exercise, exercise_theirs, opened, run, same, sound
from tests.interop.samples import sample
from tests.unit.vmdk.esx import cowd_image, sesparse_image

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
]

SIZE = (5 << 20) + 512
IN_PLACE = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
CID = b"CID="


def create(image: Path, size: int = SIZE, **options: str) -> None:
    create_image(str(image), "vmdk", session=Session(), options=options, size=size)


def created_by_qemu(image: Path, size: int, **options: str) -> None:
    given = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
    run("qemu-img", "create", "-q", "-f", "vmdk", *given, image, size)


def nothing_wrong(image: Path) -> None:
    """To QEMU, nor to us."""
    sound(image, "vmdk")
    lines: list[str] = []
    with opened(image, "vmdk", writable=False) as disk:
        result = driver("vmdk").check(disk.node, Fix(), lines.append)
    assert (lines, result.corruptions, result.leaks) == ([], 0, 0)


@pytest.mark.parametrize("zeroed", ["off", "on"])
@pytest.mark.parametrize("subformat", IN_PLACE)
def test_both_ways(tmp_path: Path, subformat: str, zeroed: str) -> None:
    if zeroed == "on" and subformat.endswith("Flat"):
        with pytest.raises(LaminaError, match="Flat image can't enable zeroed grain"):
            create(tmp_path / "x", subformat=subformat, zeroed_grain=zeroed)
        return
    content = bytearray(SIZE)
    image = tmp_path / "image.vmdk"
    rng = random.Random(subformat + zeroed)
    create(image, subformat=subformat, zeroed_grain=zeroed)
    exercise(image, "vmdk", content, rng)
    same(image, "vmdk", content)
    nothing_wrong(image)
    exercise_theirs(image, "vmdk", content, rng)
    exercise(image, "vmdk", content, rng)
    same(image, "vmdk", content)
    sound(image, "vmdk")


@pytest.mark.parametrize("subformat", [*IN_PLACE, "streamOptimized"])
def test_made_by_qemu(tmp_path: Path, subformat: str) -> None:
    """Converted both ways, and shown in the same words."""
    rng = random.Random(subformat)
    content = rng.randbytes(700_000) + bytes(1 << 20) + b"text" * 200_000 + bytes(70_000)
    content = content.ljust(SIZE, b"\0")
    raw, image = tmp_path / "in.raw", tmp_path / "image.vmdk"
    raw.write_bytes(content)
    options = ["-O", "vmdk", "-o", f"subformat={subformat}"]
    run("qemu-img", "convert", "-f", "raw", *options, raw, image)
    with opened(image, "vmdk", writable=False) as disk:
        assert disk.read(0, disk.size) == content
    nothing_wrong(image)
    for words in (["info"], ["info", "--output=json"], ["map"], ["map", "--output=json"]):
        status = int(words == ["map"] and subformat == "streamOptimized")
        theirs = run("qemu-img", *words, image, status=status).replace("qemu-img:", "lamina-img:")
        assert run("lamina-img", *words, image, status=status) == theirs
    ours = tmp_path / "ours.vmdk"
    run("lamina-img", "convert", "-f", "raw", *options, raw, ours)
    same(ours, "vmdk", bytearray(content))
    nothing_wrong(ours)
    assert run("lamina-img", "map", "--output=json", ours) == run(
        "qemu-img", "map", "--output=json", ours
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zeroed_grain": "on"},
        {"compat6": "on", "adapter_type": "lsilogic"},
        {"hwversion": "11", "toolsversion": "10", "adapter_type": "buslogic"},
        {"subformat": "monolithicFlat", "adapter_type": "legacyESX"},
        {"subformat": "twoGbMaxExtentSparse"},
        {"subformat": "twoGbMaxExtentFlat", "toolsversion": ""},
    ],
)
@pytest.mark.parametrize("size", [SIZE, 5 << 30])
def test_same_bytes_as_qemu(tmp_path: Path, options: dict[str, str], size: int) -> None:
    """But for the CID, which is random."""
    for home, make in (("ours", create), ("theirs", created_by_qemu)):
        (tmp_path / home).mkdir()
        make(tmp_path / home / "disk.vmdk", size, **options)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        heads = []
        for home in ("ours", "theirs"):
            with (tmp_path / home / name).open("rb") as file:
                # A CID may have fewer digits, and more NULs behind the descriptor.
                head = file.read(1 << 20).split(b"\n")
            heads.append([line.strip(b"\0") for line in head if not line.startswith(CID)])
        assert heads[0] == heads[1]


def test_backing_files(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.vmdk", tmp_path / "overlay.vmdk"
    content = bytearray(random.Random(1).randbytes(SIZE))
    raw = tmp_path / "in.raw"
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, base)
    for maker in (create, created_by_qemu):
        maker(overlay, SIZE, backing_file="base.vmdk", backing_fmt="vmdk")
        now = bytearray(content)
        rng = random.Random(2)
        exercise(overlay, "vmdk", now, rng)
        exercise_theirs(overlay, "vmdk", now, rng)
        exercise(overlay, "vmdk", now, rng)
        same(overlay, "vmdk", now)
        nothing_wrong(overlay)
    shown = run("lamina-img", "info", overlay)
    assert shown == run("qemu-img", "info", overlay)
    # Committed, an overlay still goes with its parent.
    run("lamina-img", "commit", "-q", overlay)
    same(base, "vmdk", now)
    same(overlay, "vmdk", now)
    # A parent that was changed behind its back is noticed.
    run("qemu-io", "-f", "vmdk", "-c", "write 1M 4k", base)
    for tool in ("lamina", "qemu"):
        said = run(f"{tool}-io", "-r", "-f", "vmdk", "-c", "read 1M 4k", overlay, status=1)
        assert said == "read failed: Invalid argument\n"
        assert "base.vmdk" in run(f"{tool}-img", "map", overlay)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("subformat=foo", "1M"),
        ("adapter_type=foo", "1M"),
        ("compat6=on,hwversion=7", "1M"),
        ("subformat=monolithicFlat,zeroed_grain=on", "1M"),
        ("subformat=monolithicFlat,backing_file=base.vmdk,backing_fmt=vmdk", "1M"),
        ("subformat=monolithicFlat,backing_file=base.raw,backing_fmt=raw", "1M"),
        ("backing_file=base.vmdk,backing_fmt=raw", "1M"),
        ("backing_file=base.raw,backing_fmt=raw", "1M"),
        ("backing_file=base.raw,backing_fmt=vmdk", "1M"),
        ("backing_file=gone.vmdk,backing_fmt=vmdk", "1M"),
        ("subformat=streamOptimized,toolsversion=3,backing_file=base.vmdk,backing_fmt=vmdk", "2M"),
    ],
)
def test_creating_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, size: str
) -> None:
    monkeypatch.chdir(tmp_path)
    created_by_qemu(Path("base.vmdk"), 1 << 20)
    Path("base.raw").write_bytes(bytes(1 << 20))
    words = ["create", "-f", "vmdk", "-o", options, "new.vmdk", size]
    status = 0 if "streamOptimized" in options else 1
    theirs = run("qemu-img", *words, status=status)
    assert run("lamina-img", *words, status=status) == theirs.replace("qemu-img:", "lamina-img:")


STREAM_WRITES = [
    ["write -P 1 4k 4k", "write -P 2 0 64k", "read -P 2 0 64k", "write -P 3 0 64k"],
    ["write -c -P 4 128k 64k", "write -P 4 192k 128k", "write -P 4 330k 100k"],
    ["write -z 512k 64k", "read -P 0 512k 64k", "discard 64k 64k", "write -P 1 5M 512"],
]


@pytest.mark.parametrize("commands", STREAM_WRITES)
def test_streams_are_written_once(tmp_path: Path, commands: list[str]) -> None:
    """Whole grains, once each: the same answers, whoever made the stream."""
    answers = []
    for maker, tool in (
        (created_by_qemu, "qemu"),
        (created_by_qemu, "lamina"),
        (create, "lamina"),
    ):
        image = tmp_path / f"{maker.__name__}-{tool}.vmdk"
        maker(image, SIZE, subformat="streamOptimized")
        words = [word for command in commands for word in ("-c", command)]
        status = int("write -P 3 0 64k" in commands or "write -P 4 330k 100k" in commands)
        said = run(f"{tool}-io", "-f", "vmdk", *words, image, status=status)
        answers.append([line for line in said.splitlines() if "ops" not in line])
        sound(image, "vmdk")
    assert answers[0] == [line.replace("lamina", "qemu") for line in answers[1]] == [
        line.replace("lamina", "qemu") for line in answers[2]
    ]


def test_growing_and_shrinking(tmp_path: Path) -> None:
    for subformat in IN_PLACE:
        image = tmp_path / f"{subformat}.vmdk"
        content = bytearray(SIZE)
        create(image, subformat=subformat)
        rng = random.Random(subformat)
        exercise(image, "vmdk", content, rng)
        for size in (40 << 20, 3 << 20, 100 << 20):
            run("lamina-img", "resize", "-q", "--shrink", "-f", "vmdk", image, size)
            content = content[:size].ljust(size, b"\0")
            exercise_theirs(image, "vmdk", content, rng, requests=5)
            same(image, "vmdk", content)
            nothing_wrong(image)
        # Beyond what one file of a split disk holds, and into it.
        run("lamina-img", "resize", "-q", "-f", "vmdk", image, 5 << 30)
        run("qemu-io", "-f", "vmdk", "-c", "write -P 7 4G 64k", "-c", "write -P 8 1G 1M", image)
        with opened(image, "vmdk") as disk:
            assert disk.read((4 << 30) - 1, 65538) == b"\0" + b"\7" * 65536 + b"\0"
            assert disk.read(0, len(content)) == content
            assert len(disk.node.info().specific["extents"]) == (3 if "twoGb" in subformat else 1)
        nothing_wrong(image)


def test_the_samples_of_qemu(tmp_path: Path) -> None:
    image = tmp_path / "afl9.vmdk"
    image.write_bytes(sample("afl9.vmdk"))
    theirs = run("qemu-img", "info", "-f", "vmdk", image, status=1)
    assert run("lamina-img", "info", "-f", "vmdk", image, status=1) == theirs.replace(
        "qemu-img:", "lamina-img:"
    )
    image = tmp_path / "iotest-version3.vmdk"
    image.write_bytes(sample("iotest-version3.vmdk"))
    assert run("lamina-img", "info", image) == run("qemu-img", "info", image)
    theirs = json.loads(run("qemu-img", "map", "--output=json", image))
    assert json.loads(run("lamina-img", "map", "--output=json", image)) == theirs
    said = run("qemu-img", "compare", image, image)
    assert run("lamina-img", "compare", image, image) == said
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-O", "raw", image, raw)
    with opened(image, "vmdk", writable=False) as disk, raw.open("rb") as file:
        for run_ in theirs:
            if run_["data"]:
                file.seek(run_["start"])
                assert disk.read(run_["start"], run_["length"]) == file.read(run_["length"])


@pytest.mark.parametrize("subformat", [*IN_PLACE, "streamOptimized"])
def test_measured_images_fit(tmp_path: Path, subformat: str) -> None:
    raw, home = tmp_path / "raw", tmp_path / "home"
    home.mkdir()
    raw.write_bytes(random.Random(6).randbytes(1 << 20))
    with raw.open("r+b") as file:
        file.truncate(20 << 20)
    options = ["-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}"]
    said = json.loads(run("lamina-img", "measure", "--output=json", *options, raw))
    run("lamina-img", "convert", *options, raw, home / "disk.vmdk")
    size = sum(path.stat().st_size for path in home.iterdir())
    assert size <= said["required"] <= said["fully-allocated"]
    assert said["required"] < size * 1.1


def test_libvmdk_reads_ours(tmp_path: Path) -> None:
    vmdk = pytest.importorskip("pyvmdk")
    content = random.Random(3).randbytes(300_000) + bytes(200_000) + b"text" * 100_000
    content = content.ljust(SIZE, b"\0")
    raw = tmp_path / "raw"
    raw.write_bytes(content)
    for subformat in (*IN_PLACE, "streamOptimized"):
        image = tmp_path / f"{subformat}.vmdk"
        run(
            "lamina-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw,
            image,
        )
        handle = vmdk.handle()
        handle.open(str(image))
        handle.open_extent_data_files()
        try:
            assert handle.media_size == SIZE
            assert handle.read_buffer_at_offset(SIZE, 0) == content, subformat
        finally:
            handle.close()


def test_images_of_others(tmp_path: Path) -> None:
    """Bochs' bximage makes sparse ones, VMDKstream streams."""
    if shutil.which("bximage") is None or shutil.which("/usr/bin/python3") is None:
        pytest.skip("needs bximage and VMDKstream")
    # bximage wants whole cylinders.
    content = random.Random(4).randbytes(700_000) + bytes(1 << 20) + b"text" * 400_000
    content = content.ljust(8 * 16 * 63 * 512, b"\0")
    raw, sparse, stream = tmp_path / "raw", tmp_path / "sparse.vmdk", tmp_path / "stream.vmdk"
    raw.write_bytes(content)
    run("bximage", "-q", "-func=convert", "-imgmode=vmware4", raw, sparse)
    script = f"import VMDKstream; VMDKstream.convert_to_stream({str(raw)!r}, {str(stream)!r})"
    done = subprocess.run(["/usr/bin/python3", "-c", script], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr)
    for image in (sparse, stream):
        nothing_wrong(image)
        with opened(image, "vmdk", writable=False) as disk:
            assert disk.read(0, disk.size) == content
        assert run("lamina-img", "info", image) == run("qemu-img", "info", image)
    # What we add to a stream of somebody else is there, and so is what was there.
    free = 12 << 16
    with opened(stream, "vmdk") as disk:
        assert not any(disk.read(free, 65536))
        disk.write(free, b"new" * 20000 + bytes(5536))
    content = content[:free] + b"new" * 20000 + content[free + 60000 :]
    same(stream, "vmdk", bytearray(content))
    nothing_wrong(stream)


@pytest.mark.parametrize(
    ("create_type", "kind", "make", "grain"),
    [("vmfsSparse", "VMFSSPARSE", cowd_image, 512), ("seSparse", "SESPARSE", sesparse_image, 4096)],
)
def test_images_of_esx(
    tmp_path: Path, create_type: str, kind: str, make: Callable[..., bytes], grain: int
) -> None:
    """Made from their layouts: QEMU reads in them what we do."""
    rng = random.Random(kind)
    size = 9000 * grain
    grains = {number: rng.randbytes(grain) for number in (0, 1, 3, 4095, 4096, 8999, 2)}
    content = bytearray(size)
    for number, data in grains.items():
        content[number * grain : (number + 1) * grain] = data
    image = tmp_path / "disk.vmdk"
    (tmp_path / "extent").write_bytes(make(size, grains))
    line = ExtentLine("RW", size, kind, "extent")
    image.write_bytes(compose(create_type, [line]).encoded())
    same(image, "vmdk", content)
    with opened(image, "vmdk", writable=False) as disk:
        assert disk.read(0, size) == content
    for words in (["info"], ["map"], ["map", "--output=json"]):
        assert run("lamina-img", *words, image) == run("qemu-img", *words, image)
