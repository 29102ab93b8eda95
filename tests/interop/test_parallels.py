"""Parallels images between us and QEMU: data, layout, words, checks."""

from __future__ import annotations

import json
import random
import struct

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.session import Session
from tests.interop.exchange import both, output
from tests.interop.samples import sample

pytestmark = pytest.mark.peer

SIZE = 3 << 20
UNIT = 65536
CREATE = ["create", "-q", "-f", "parallels", "-o", f"cluster_size={UNIT}"]


def opened(image, **options):
    session = Session(warn=lambda text: None)
    return Backend.open(
        str(image), session=session, format="parallels", writable=True, options=options,
        discard="unmap",
    )


def exercise(disk: Backend, content: bytearray, rng: random.Random) -> None:
    for _ in range(60):
        offset = rng.randrange(SIZE - 1)
        length = min(rng.randrange(1, 200_000), SIZE - offset)
        payload = rng.choice([rng.randbytes(length), bytes(length)])
        match rng.randrange(4):
            case 0:
                disk.write_zeroes(offset, length)
                payload = bytes(length)
            case 1:
                offset = offset // UNIT * UNIT
                disk.discard(offset, UNIT)
                payload = bytes(UNIT)
            case _:
                disk.write(offset, payload)
        content[offset : offset + len(payload)] = payload


@pytest.mark.parametrize("old", [False, True], ids=["clusters", "sectors"])
def test_both_ways(tmp_path, old):
    image, raw = tmp_path / "image.hds", tmp_path / "raw"
    assert output("lamina-img", *CREATE, image, SIZE)[0] == 0
    if old:
        # QEMU makes no images that count sectors, but reads and writes them.
        data = bytearray(image.read_bytes())
        data[:16] = b"WithoutFreeSpace"
        image.write_bytes(data)
    content = bytearray(SIZE)
    rng = random.Random(old)
    for _ in range(2):
        with opened(image) as disk:
            exercise(disk, content, rng)
            assert disk.read(0, SIZE) == content
        assert output("qemu-img", "check", image)[0] == 0
        assert output("qemu-img", "convert", "-f", "parallels", "-O", "raw", image, raw)[0] == 0
        assert raw.read_bytes() == content
        writes = []
        for _ in range(20):
            offset = rng.randrange(0, SIZE - 70_000, 512)
            length = rng.randrange(512, 60_000, 512)
            pattern = rng.randrange(1, 256)
            content[offset : offset + length] = bytes([pattern]) * length
            writes += ["-c", f"write -P {pattern} {offset} {length}"]
        offset = rng.randrange(SIZE // UNIT) * UNIT
        content[offset : offset + UNIT] = bytes(UNIT)
        writes += ["-c", f"discard {offset} {UNIT}"]
        assert output("qemu-io", "-f", "parallels", *writes, image)[2] == ""
        assert output("lamina-img", "check", image)[0] == 0
        with opened(image) as disk:
            assert disk.read(0, SIZE) == content
        ours, theirs = both("img", "map", "--output=json", image)
        assert ours == theirs


@pytest.mark.parametrize("kind", ["clusters", "sectors", "behind the BAT"])
def test_qemu_reads_what_was_resized(tmp_path, kind):
    """Up and down, again and again; QEMU, which cannot do it itself, writes between."""
    image, raw = tmp_path / "image.hds", tmp_path / "raw"
    maker = "lamina-img" if kind == "sectors" else "qemu-img"
    words = ["create", "-q", "-f", "parallels", "-o", "cluster_size=4k", image, SIZE]
    assert output(maker, *words)[0] == 0
    writer = "qemu-io"
    data = bytearray(image.read_bytes())
    if kind != "clusters":
        data[:16] = b"WithoutFreeSpace"
    if kind == "behind the BAT":
        # The grid of the clusters does not begin with the file. QEMU finds clusters outside of
        # such a file before there are any.
        struct.pack_into("<I", data, 48, 0)
        del data[3584:]
        writer = "lamina-io"
    image.write_bytes(data)
    content = bytearray(SIZE)
    rng = random.Random(kind)
    for size in (6 << 20, 1 << 20, (256 << 20) + 512, 512, 40 << 20):
        writes = []
        for _ in range(6):
            room = min(len(content), 8 << 20)
            offset = rng.randrange(0, room, 512)
            length = min(rng.randrange(512, 60_000, 512), room - offset)
            pattern = rng.randrange(1, 256)
            content[offset : offset + length] = bytes([pattern]) * length
            writes += ["-c", f"write -P {pattern} {offset} {length}"]
        assert output(writer, "-f", "parallels", *writes, image)[2] == ""
        writer = "qemu-io"
        words = ["resize", "-q", "-f", "parallels", "--shrink", image, size]
        assert output("lamina-img", *words) == (0, "", "")
        content = content[:size].ljust(size, b"\0")
        code, text, errors = output("qemu-img", "check", image)
        assert (code, errors) == (0, ""), text
        raw.write_bytes(content.rstrip(b"\0"))
        with open(raw, "ab") as file:
            file.truncate(size)
        words = ["compare", "-f", "parallels", "-F", "raw", image, raw]
        assert output("qemu-img", *words)[:2] == (0, "Images are identical.\n")
        assert image.stat().st_size <= 2 << 20


def test_conversions(tmp_path):
    raw = tmp_path / "raw"
    rng = random.Random(3)
    raw.write_bytes(bytes(UNIT) + rng.randbytes(3 * UNIT) + bytes(5 * UNIT) + b"x" * 1000)
    for number, (writer, reader) in enumerate([("lamina", "qemu"), ("qemu", "lamina")]):
        image, back = tmp_path / f"{number}.hds", tmp_path / f"{number}.raw"
        words = ["convert", "-O", "parallels", "-o", f"cluster_size={UNIT}", raw, image]
        assert output(f"{writer}-img", *words) == (0, "", "")
        assert output(f"{reader}-img", "convert", "-O", "raw", image, back) == (0, "", "")
        assert back.read_bytes().rstrip(b"\0") == raw.read_bytes()
    images = [(tmp_path / f"{number}.hds").read_bytes() for number in (0, 1)]
    # But for the word that says who closed it.
    assert images[0][:44] + images[0][48:] == images[1][:44] + images[1][48:]


@pytest.mark.parametrize("size", [0, 513, (1 << 40) + 512])
@pytest.mark.parametrize("cluster", ["", "4k", "100000"])
def test_same_new_images(tmp_path, size, cluster):
    found = []
    for tool in ("lamina-img", "qemu-img"):
        image = tmp_path / "image"
        options = ["-o", f"cluster_size={cluster}"] if cluster else []
        found.append(output(tool, "create", "-f", "parallels", *options, image, size))
        with open(image, "rb") as file:
            found[-1] += (file.read(4096), image.stat().st_size)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "words",
    [
        ["create", "-f", "parallels", "-o", "help"],
        ["create", "-f", "parallels", "-o", "cluster_size=3G", "NEW", "1M"],
        ["create", "-f", "parallels", "-o", "cluster_size=0", "NEW", "1M"],
        ["create", "-f", "parallels", "NEW", "4P"],
        ["create", "-f", "parallels", "-b", "IMAGE", "-F", "parallels", "NEW", "1M"],
        ["amend", "-f", "parallels", "-o", "size=1", "IMAGE"],
        ["snapshot", "-c", "one", "IMAGE"],
        ["convert", "-c", "-O", "parallels", "IMAGE", "NEW"],
        ["measure", "-O", "parallels", "IMAGE"],
        ["info", "IMAGE"],
        ["info", "--output=json", "IMAGE"],
        ["map", "IMAGE"],
        ["check", "IMAGE"],
        ["check", "--output=json", "IMAGE"],
    ],
    ids=" ".join,
)
def test_same_words(tmp_path, words):
    image = tmp_path / "image"
    assert output("qemu-img", *CREATE, image, SIZE)[0] == 0
    assert output("qemu-io", "-c", "write 100k 1M", image)[2] == ""
    names = {"IMAGE": image, "NEW": tmp_path / "new"}
    ours, theirs = both("img", *(names.get(word, word) for word in words))
    assert ours == theirs


@pytest.mark.parametrize(
    "options", ["prealloc-mode=full", "prealloc-size=5x", "prealloc-mode=truncate,prealloc-size=1M"]
)
def test_runtime_options(tmp_path, options):
    image = tmp_path / "image"
    found = []
    for tool in ("lamina-io", "qemu-io"):
        assert output("qemu-img", *CREATE, image, SIZE)[0] == 0
        how = f"driver=parallels,file.filename={image},{options}"
        code, _, text = output(tool, "--image-opts", "-c", "write 0 64k", how)
        found.append((code, text.replace(tool, "qemu-io"), image.stat().st_size))
    assert found[0] == found[1]


DAMAGES = {
    "none": [],
    "unclean": [(44, 0x746F6E59)],
    "another word for closed": [(44, 5)],
    "duplicate": [(68, 1)],
    "three of a kind": [(68, 1), (72, 1)],
    "no data_off": [(48, 0)],
    "data_off 1": [(48, 1)],
    "data_off far away": [(48, 0x7FFFFFFF)],
    "magic": [(0, 5)],
    "version": [(16, 3)],
    "no tracks": [(28, 0)],
    "many tracks": [(28, 0x7FFFFFFF)],
    "catalog": [(32, 0x7FFFFFFF)],
    "ext_off": [(60, 0x40000000)],
}


@pytest.mark.parametrize("fix", [[], ["-r", "leaks"], ["-r", "all"]], ids=" ".join)
@pytest.mark.parametrize("damage", DAMAGES)
def test_same_checks(tmp_path, damage, fix):
    more = 100_000 if damage in ("none", "unclean", "duplicate") else 0
    image = tmp_path / "image"
    assert output("qemu-img", *CREATE, image, 1 << 20)[0] == 0
    writes = ["-c", "write -P 1 0 64k", "-c", "write -P 2 128k 64k", "-c", "write -P 3 256k 128k"]
    assert output("qemu-io", *writes, image)[2] == ""
    data = bytearray(image.read_bytes()) + bytes(more)
    for offset, number in DAMAGES[damage]:
        struct.pack_into("<I", data, offset, number)
    found = []
    for tool in ("lamina-img", "qemu-img"):
        image.write_bytes(data)
        code, text, errors = output(tool, "check", "-f", "parallels", *fix, image)
        after = bytearray(image.read_bytes())
        # QEMU says that it closed the image even where it was not told to repair that.
        after[44:48] = bytes(4)
        found.append((code, text, errors.replace(tool, "qemu-img"), after))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["cluster 0 is outside image", "data_off"])
def test_what_qemu_may_die_of(tmp_path, kind):
    """Some of its versions end such checks by an assertion."""
    image = tmp_path / "image"
    assert output("qemu-img", *CREATE, image, 1 << 20)[0] == 0
    assert output("qemu-io", "-c", "write -P 1 0 64k", image)[2] == ""
    data = bytearray(image.read_bytes())
    place = (64, 100) if kind.startswith("cluster") else (48, 256)
    struct.pack_into("<I", data, *place)
    image.write_bytes(data)
    code, text, errors = output("lamina-img", "check", image)
    assert code == 2
    assert kind in errors
    assert "1 errors were found on the image." in text
    assert output("lamina-img", "check", "-r", "all", image)[0] == 0
    assert output("qemu-img", "check", image)[0] == 0


@pytest.mark.parametrize("name", ["parallels-v1", "parallels-v2", "parallels-with-bitmap"])
def test_samples(tmp_path, name):
    image = tmp_path / name
    image.write_bytes(sample(name))
    if name != "parallels-with-bitmap":
        ours, theirs = both("img", "check", image)
        assert ours == theirs
    else:
        # QEMU takes the bitmap for leaked clusters.
        assert output("lamina-img", "check", image)[0] == 0
        text = output("lamina-img", "info", "--output=json", image)[1]
        assert json.loads(text)["format-specific"]["data"]["bitmaps"] == [
            {"name": "e4f2eed0-37fe-4539-b50b-85d2e7fd235f", "granularity": 65536}
        ]
        session = Session()
        with Backend.open(str(image), session=session, format="parallels") as disk:
            (bitmap,) = disk.node.dirty_bitmaps
            dirty = [(start >> 16, length >> 16) for start, length in bitmap.ranges()]
            # What the script beside the sample wrote.
            assert dirty == [(5, 2), (10, 3), (30, 1)]
        return
    for tool in ("lamina-img", "qemu-img"):
        assert output(tool, "convert", "-O", "raw", image, tmp_path / tool)[0] == 0
    assert (tmp_path / "lamina-img").read_bytes() == (tmp_path / "qemu-img").read_bytes()


def test_backing_file_by_option(tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    create_image(str(base), "parallels", session=Session(), size=SIZE)
    create_image(str(top), "parallels", session=Session(), size=SIZE)
    with opened(base) as disk:
        disk.write(0, b"*" * UNIT * 20)
    how = f"driver=parallels,file.filename={top},backing.driver=parallels"
    how += f",backing.file.filename={base}"
    assert output("lamina-io", "--image-opts", "-c", "write -P 1 0 64", how)[2] == ""
    reads = ["-c", "read -P 1 0 64", "-c", f"read -P 42 64 {UNIT}", "-c", "read -P 0 2M 64k"]
    ours, theirs = (output(tool, "--image-opts", *reads, how) for tool in ("lamina-io", "qemu-io"))
    assert "verification failed" not in ours[1] + theirs[1]
    assert (ours[0], theirs[0]) == (0, 0)
