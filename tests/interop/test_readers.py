"""Bochs and cloop images, made by their own tools, as we and QEMU read them."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.interop.exchange import both, output
from tests.interop.samples import sample
from tests.unit.test_bochs import redolog
from tests.unit.test_cloop import pack

pytestmark = pytest.mark.peer

SIZE = 4 * 16 * 63 * 512
"""Bytes: bximage wants whole cylinders."""


@pytest.fixture
def content():
    rng = random.Random(1)
    parts = [rng.randbytes(30_000) + bytes(rng.randrange(40_000)) for _ in range(60)]
    return b"".join(parts)[:SIZE].ljust(SIZE, b"\0")


@pytest.fixture
def raw(tmp_path, content):
    path = tmp_path / "raw"
    path.write_bytes(content)
    return path


def converted(tool, image, tmp_path, *words) -> bytes:
    target = tmp_path / "converted"
    assert output(f"{tool}-img", "convert", *words, "-O", "raw", image, target) == (0, "", "")
    return target.read_bytes()


@pytest.mark.skipif(shutil.which("bximage") is None, reason="needs bximage")
@pytest.mark.parametrize("kind", ["growing", "sparse", "flat"])
def test_bximage(tmp_path, raw, content, kind):
    image = tmp_path / "image"
    command = ["bximage", "-q", "-func=convert", f"-imgmode={kind}", raw, image]
    assert output(*command)[0] == 0
    assert converted("lamina", image, tmp_path) == content
    if kind != "sparse":
        assert converted("qemu", image, tmp_path) == content


@pytest.mark.skipif(shutil.which("create_compressed_fs") is None, reason="needs cloop-utils")
@pytest.mark.parametrize("level", [-1, 0, 1, 9])
@pytest.mark.parametrize("block", [65536, 131072, 512])
def test_create_compressed_fs(tmp_path, raw, content, block, level):
    image = tmp_path / "image"
    command = ["create_compressed_fs", "-q", "-B", block, "-L", level, raw, image]
    if block == 512:
        raw.write_bytes(content[: 100 * 512])
        content = content[: 100 * 512]
    assert output(*command)[0] == 0
    expected = content + bytes(-len(content) % block)
    for tool in ("lamina", "qemu"):
        assert converted(tool, image, tmp_path) == expected


@pytest.mark.parametrize("extent", [512, 8192, 1 << 20])
@pytest.mark.parametrize("version", [0x10000, 0x20000])
def test_growing(tmp_path, content, extent, version):
    image = tmp_path / "image"
    image.write_bytes(redolog(content, extent, version=version))
    assert converted("lamina", image, tmp_path) == content
    assert converted("qemu", image, tmp_path) == content


@pytest.mark.parametrize("name", ["empty.bochs", "simple-pattern.cloop"])
def test_samples(tmp_path, name):
    image = tmp_path / name
    image.write_bytes(sample(name))
    assert converted("lamina", image, tmp_path) == converted("qemu", image, tmp_path)


def images(tmp_path):
    found = {"bochs": redolog(b"x" * 100_352), "cloop": pack(b"x" * 100_352)}
    for format, data in found.items():
        (tmp_path / format).write_bytes(data)
    return found


@pytest.mark.parametrize("format", ["bochs", "cloop"])
@pytest.mark.parametrize(
    "words",
    [
        ["info", "IMAGE"],
        ["info", "--output=json", "IMAGE"],
        ["check", "IMAGE"],
        ["resize", "IMAGE", "20M"],
        ["amend", "-o", "a=b", "IMAGE"],
        ["snapshot", "-c", "one", "IMAGE"],
        ["commit", "IMAGE"],
        ["rebase", "-b", "", "IMAGE"],
        ["create", "-f", "FORMAT", "new", "1M"],
        ["convert", "-O", "FORMAT", "IMAGE", "new"],
        ["measure", "-O", "FORMAT", "IMAGE"],
        ["info", "-f", "bochs", "/dev/null"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_same_words(tmp_path, format, words):
    images(tmp_path)
    names = {"IMAGE": tmp_path / format, "FORMAT": format}
    ours, theirs = both("img", *(names.get(word, word) for word in words))
    assert ours == theirs


@pytest.mark.parametrize("format", ["bochs", "cloop"])
@pytest.mark.parametrize(
    "words",
    [
        ["-c", "read 0 512", "IMAGE"],
        ["-f", "FORMAT", "-c", "write 0 512", "IMAGE"],
        ["-r", "-c", "write 0 512", "IMAGE"],
        ["--image-opts", "-c", "read 0 1", "driver=FORMAT,auto-read-only=on,file.filename=IMAGE"],
    ],
)
def test_same_words_for_writers(tmp_path, format, words):
    images(tmp_path)
    path = str(tmp_path / format)
    words = [word.replace("IMAGE", path).replace("FORMAT", format) for word in words]
    ours, theirs = both("io", *words)
    assert ours == theirs


DAMAGES = [
    ("bochs", 0, 0),
    ("bochs", 48, 1),
    ("bochs", 64, 0x30000),
    ("bochs", 64, 0x10000),
    ("bochs", 72, 0x100001),
    ("bochs", 72, 1),
    ("bochs", 80, 0),
    ("bochs", 80, 3000),
    ("bochs", 80, 1 << 24),
    ("bochs", 92, 1 << 30),
    ("cloop", 128, 0),
    ("cloop", 128, 0x00000100),
    ("cloop", 128, 0x00020000),
    ("cloop", 128, 0x00000010),
    ("cloop", 132, 0xFFFFFFFF),
    ("cloop", 144, 0xFFFFFFFF),
    ("cloop", 152, 0xFFFFFFFF),
]


@pytest.mark.parametrize(("format", "offset", "value"), DAMAGES)
def test_same_refusals(tmp_path, format, offset, value):
    data = bytearray(images(tmp_path)[format])
    data[offset : offset + 4] = value.to_bytes(4, "little")
    path = tmp_path / format
    path.write_bytes(data)
    ours, theirs = both("img", "info", "-f", format, path)
    assert ours == theirs
