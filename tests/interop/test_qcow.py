"""qcow version 1 between us and QEMU, which is its only other implementation."""

from __future__ import annotations

import random
import subprocess

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.secrets import Secrets
from lamina.block.session import Session

pytestmark = pytest.mark.peer

SIZE = 5 << 20
SECRET = ["--object", "secret,id=key,data=a passphrase that is longer than its key"]
KINDS = ["plain", "backed", "encrypted"]


@pytest.fixture
def session():
    secrets = Secrets()
    secrets.add("key", b"a passphrase that is longer than its key")
    return Session(secrets=secrets, warn=lambda text: None)


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def creation_options(kind: str) -> dict[str, str]:
    return {
        "plain": {},
        "backed": {"backing_file": "base.raw", "backing_fmt": "raw"},
        "encrypted": {"encrypt.format": "aes", "encrypt.key-secret": "key"},
    }[kind]


def described(kind: str, image: object) -> list[object]:
    """How QEMU's tools are told what to open."""
    if kind != "encrypted":
        return ["-f", "qcow", image]
    return ["--image-opts", f"driver=qcow,file.filename={image},encrypt.key-secret=key"]


def base(tmp_path, kind: str) -> bytearray:
    if kind != "backed":
        return bytearray(SIZE)
    content = random.Random(5).randbytes(SIZE - 100_000)
    (tmp_path / "base.raw").write_bytes(content)
    return bytearray(content.ljust(SIZE, b"\0"))


def exercise(disk: Backend, content: bytearray, rng: random.Random, step: int) -> None:
    for _ in range(60):
        offset = rng.randrange(0, SIZE - 1, step)
        length = min(rng.randrange(1, 90_000), SIZE - offset)
        payload = rng.choice([rng.randbytes(length), bytes(length)])
        content[offset : offset + length] = payload
        disk.write(offset, payload)
    if disk.node.supports_compressed_writes:
        unit = disk.node.info().cluster_size
        for number in range(7):
            content[number * unit * 3 : number * unit * 3 + unit] = bytes([number]) * unit
            disk.write_compressed([(number * unit * 3, bytes([number]) * unit)])


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(tmp_path, session, kind):
    content = base(tmp_path, kind)
    image = tmp_path / "image.qcow"
    options = creation_options(kind)
    create_image(str(image), "qcow", session=session, options=options, size=SIZE)
    rng = random.Random(kind)

    def opened():
        given = {"encrypt.key-secret": "key"} if kind == "encrypted" else {}
        if kind == "backed":
            given["backing.driver"] = "raw"
        return Backend.open(
            str(image), session=session, format="qcow", writable=True, options=given
        )

    with opened() as disk:
        exercise(disk, content, rng, 1)
        assert disk.read(0, SIZE) == content
    raw = tmp_path / "out.raw"
    run("qemu-img", "convert", *SECRET, *described(kind, image), "-O", "raw", raw)
    assert raw.read_bytes() == content

    writes = []
    for _ in range(30):
        offset = rng.randrange(0, SIZE - 70_000, 512)
        length = rng.randrange(512, 60_000, 512)
        pattern = rng.randrange(1, 256)
        content[offset : offset + length] = bytes([pattern]) * length
        writes += ["-c", f"write -P {pattern} {offset} {length}"]
    run("qemu-io", *SECRET, *described(kind, image), *writes)
    with opened() as disk:
        assert disk.read(0, SIZE) == content
        exercise(disk, content, rng, 512)
    run("qemu-img", "convert", *SECRET, *described(kind, image), "-O", "raw", raw)
    assert raw.read_bytes() == content


def test_same_layout_as_qemu(tmp_path, session):
    for options in ({}, {"backing_file": "base.raw", "backing_fmt": "raw"}):
        base(tmp_path, "backed")
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        create_image(str(ours), "qcow", session=session, options=options, size=SIZE)
        given = ["-o", ",".join(f"{k}={v}" for k, v in options.items())] if options else []
        run("qemu-img", "create", "-q", "-f", "qcow", *given, theirs, SIZE)
        length = min(ours.stat().st_size, theirs.stat().st_size)
        assert ours.read_bytes()[:length] == theirs.read_bytes()[:length]
        assert not any(theirs.read_bytes()[length:])


def test_empty_again(tmp_path, session):
    """What commit does to an overlay."""
    content = base(tmp_path, "backed")
    image = tmp_path / "image.qcow"
    options = creation_options("backed")
    create_image(str(image), "qcow", session=session, options=options, size=SIZE)
    given = {"backing.driver": "raw"}
    with Backend.open(
        str(image), session=session, format="qcow", writable=True, options=given
    ) as disk:
        before = image.stat().st_size
        disk.write(12345, b"x" * 300_000)
        from lamina.block.registry import driver

        driver("qcow").make_empty(disk.node)
        assert disk.read(0, SIZE) == content
        disk.write(100, b"again")
        content[100:105] = b"again"
        assert disk.read(0, SIZE) == content
    assert image.stat().st_size < before + 100_000
    raw = tmp_path / "out.raw"
    run("qemu-img", "convert", "-f", "qcow", image, "-O", "raw", raw)
    assert raw.read_bytes() == content
