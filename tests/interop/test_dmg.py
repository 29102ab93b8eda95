"""DMGs as we and QEMU read them; QEMU knows zlib, raw and zero chunks."""

from __future__ import annotations

import random

import pytest

from tests.interop.exchange import both, output
from tests.interop.samples import sample
from tests.unit.dmg.images import RAW, pack

pytestmark = pytest.mark.peer

ZLIB = 0x80000005


@pytest.fixture
def content():
    rng = random.Random(1)
    return rng.randbytes(70_144) + bytes(300_032) + b"compress me " * 25_600


@pytest.fixture(params=["zlib", "raw", "resource fork", "misaligned"])
def image(request, content, tmp_path):
    packed = {
        "zlib": lambda: pack(content),
        "raw": lambda: pack(content, (RAW,)),
        "resource fork": lambda: pack(content, (ZLIB, RAW), binary=True),
        "misaligned": lambda: pack(content, (ZLIB,), chunk=33, partitions=5) + b"\0\0\0",
    }[request.param]()
    path = tmp_path / "image.dmg"
    path.write_bytes(packed)
    return path


def test_same_disk(image, content, tmp_path):
    for tool in ("lamina-img", "qemu-img"):
        raw = tmp_path / tool
        assert output(tool, "convert", "-O", "raw", image, raw) == (0, "", "")
        assert raw.read_bytes() == content
    assert output("lamina-img", "compare", image, tmp_path / "qemu-img")[0] == 0
    code, text, _ = output("lamina-img", "check", image)
    assert (code, text.splitlines()[0]) == (0, "No errors were found on the image.")


def test_same_info(image):
    for words in (["info", image], ["info", "--output=json", image]):
        ours, theirs = both("img", *words)
        assert ours == theirs


@pytest.mark.parametrize(
    "words",
    [
        ["resize", "IMAGE", "20M"],
        ["amend", "-o", "a=b", "IMAGE"],
        ["snapshot", "-c", "one", "IMAGE"],
        ["commit", "IMAGE"],
        ["rebase", "-b", "", "IMAGE"],
        ["create", "-f", "dmg", "new.dmg", "1M"],
        ["convert", "-O", "dmg", "IMAGE", "new.dmg"],
        ["info", "-f", "dmg", "/dev/null"],
    ],
    ids=lambda words: words[0],
)
def test_same_refusals(tmp_path, words):
    image = tmp_path / "image.dmg"
    image.write_bytes(pack(b"x" * 1024))
    ours, theirs = both("img", *(image if word == "IMAGE" else word for word in words))
    assert ours == theirs
    assert ours[0] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "read 0 512", "IMAGE"],
        ["-f", "dmg", "-c", "write 0 512", "IMAGE"],
        ["-r", "-c", "write 0 512", "IMAGE"],
        ["--image-opts", "-c", "read 0 1", "driver=dmg,auto-read-only=on,file.filename=IMAGE"],
    ],
)
def test_same_words_for_writers(tmp_path, words):
    image = tmp_path / "image.dmg"
    image.write_bytes(pack(b"x" * 1024))
    ours, theirs = both("io", *(word.replace("IMAGE", str(image)) for word in words))
    assert ours == theirs


def test_an_image_made_by_apple(tmp_path):
    image = tmp_path / "simple.dmg"
    image.write_bytes(sample("simple-dmg.dmg"))
    for tool in ("lamina-img", "qemu-img"):
        assert output(tool, "convert", "-O", "raw", image, tmp_path / tool)[0] == 0
    assert (tmp_path / "lamina-img").read_bytes() == (tmp_path / "qemu-img").read_bytes()
    # Its checksums leave out what is ignored.
    assert output("lamina-img", "check", image)[:2] == (
        0,
        "No errors were found on the image.\nImage end offset: 19479\n",
    )
