"""Encrypted qcow2 images between us and QEMU."""

from __future__ import annotations

import random
import subprocess

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.errors import LaminaError

pytestmark = pytest.mark.peer

SIZE = 3 << 20
SECRET = ["--object", "secret,id=key,data=open sesame"]
KINDS = {
    "aes": {"encrypt.format": "aes"},
    "luks": {"encrypt.format": "luks", "encrypt.iter-time": "10"},
    "essiv": {
        "encrypt.format": "luks",
        "encrypt.iter-time": "10",
        "encrypt.cipher-mode": "cbc",
        "encrypt.ivgen-alg": "essiv",
        "encrypt.cipher-alg": "aes-128",
        "cluster_size": "512",
    },
    "backed": {
        "encrypt.format": "luks",
        "encrypt.iter-time": "10",
        "backing_file": "base.raw",
        "backing_fmt": "raw",
        "cluster_size": "4096",
    },
}


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def described(image) -> str:
    return f"driver=qcow2,file.filename={image},encrypt.key-secret=key"


@pytest.fixture
def session():
    secrets = Secrets()
    secrets.add("key", b"open sesame")
    return Session(secrets=secrets, warn=lambda text: None)


@pytest.mark.parametrize("maker", ["ours", "qemu"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(tmp_path, session, kind, maker):
    rng = random.Random(kind)
    options = {**KINDS[kind], "encrypt.key-secret": "key"}
    content = bytearray(SIZE)
    if kind == "backed":
        content[: 2 << 20] = rng.randbytes(2 << 20)
        (tmp_path / "base.raw").write_bytes(content[: 2 << 20])
    image = tmp_path / "image.qcow2"
    if maker == "ours":
        create_image(str(image), "qcow2", session=session, options=options, size=SIZE)
    else:
        given = ",".join(f"{key}={value}" for key, value in options.items())
        run("qemu-img", "create", "-q", "-f", "qcow2", *SECRET, "-o", given, image, SIZE)
    for _ in range(2):
        with Backend.open(
            str(image), session=session, writable=True, options={"encrypt.key-secret": "key"}
        ) as disk:
            assert disk.read(0, SIZE) == content
            for _ in range(40):
                offset = rng.randrange(SIZE - 1)
                length = min(rng.randrange(1, 70_000), SIZE - offset)
                match rng.randrange(5):
                    case 0:
                        disk.write_zeroes(offset, length)
                        content[offset : offset + length] = bytes(length)
                    case _:
                        payload = rng.randbytes(length)
                        disk.write(offset, payload)
                        content[offset : offset + length] = payload
            assert disk.read(0, SIZE) == content
        run("qemu-img", "check", *SECRET, "--image-opts", described(image))
        raw = tmp_path / "out.raw"
        run("qemu-img", "convert", *SECRET, "--image-opts", described(image), "-O", "raw", raw)
        assert raw.read_bytes() == content
        offset = rng.randrange(0, SIZE - 65536, 512)
        run(
            *("qemu-io", *SECRET, "--image-opts", described(image)),
            *("-c", f"write -P 77 {offset} 65536"),
        )
        content[offset : offset + 65536] = b"\x4d" * 65536


def test_what_is_wrong_is_said(tmp_path, session):
    image = str(tmp_path / "image.qcow2")
    options = {**KINDS["luks"], "encrypt.key-secret": "key"}
    create_image(image, "qcow2", session=session, options=options, size=SIZE)
    session.secrets.add("wrong", b"wrong")
    for given, message in (
        ({}, "Parameter 'encrypt.key-secret' is required for cipher"),
        ({"encrypt.key-secret": "none"}, "No secret with id 'none'"),
        ({"encrypt.key-secret": "wrong"}, "Invalid password, cannot unlock any keyslot"),
        ({"encrypt.format": "aes"}, "Header reported 'luks' encryption format"),
    ):
        with pytest.raises(LaminaError, match=message):
            Backend.open(image, session=session, options=given)
    with Backend.open(image, session=session, inspect=True) as disk:
        assert disk.info().specific["encrypt"]["format"] == "luks"
    with (
        Backend.open(
            image, session=session, writable=True, options={"encrypt.key-secret": "key"}
        ) as disk,
        pytest.raises(LaminaError, match="Compression"),
    ):
        disk.write_compressed([(0, bytes(65536))])
