"""LUKS volumes between us, QEMU and cryptsetup."""

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
COMBINATIONS = [
    {},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv", "cipher-alg": "aes-128", "hash-alg": "sha1"},
    {"cipher-mode": "ctr", "hash-alg": "sha512"},
    {"cipher-mode": "ecb", "cipher-alg": "aes-128", "ivgen-alg": "plain"},
]


@pytest.fixture
def session():
    secrets = Secrets()
    secrets.add("key", b"open sesame")
    return Session(secrets=secrets, warn=lambda text: None)


def run(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout


def qemu_content(image, raw) -> bytes:
    options = f"driver=luks,file.filename={image},key-secret=key"
    run("qemu-img", "convert", *SECRET, "--image-opts", options, "-O", "raw", raw)
    return raw.read_bytes()


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(options.values()))
def test_qemu_reads_ours(tmp_path, session, options):
    image = tmp_path / "ours.luks"
    given = {"key-secret": "key", "iter-time": "10", **options}
    create_image(str(image), "luks", session=session, options=given, size=SIZE)
    content = bytearray(random.Random(1).randbytes(SIZE))
    with Backend.open(
        str(image), session=session, format="luks", writable=True, options={"key-secret": "key"}
    ) as disk:
        assert disk.size == SIZE
        disk.write(0, content)
        # Neither aligned nor whole sectors: the rest of the sectors must survive.
        content[1000:1777] = b"x" * 777
        disk.write(1000, b"x" * 777)
        assert disk.read(0, SIZE) == content
        assert disk.read(513, 1000) == content[513:1513]
    assert qemu_content(image, tmp_path / "raw") == content


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(options.values()))
def test_ours_reads_qemu(tmp_path, session, options):
    image = tmp_path / "theirs.luks"
    settings = {"key-secret": "key", "iter-time": 10, **options}
    given = ",".join(f"{key}={value}" for key, value in settings.items())
    run("qemu-img", "create", "-q", *SECRET, "-f", "luks", "-o", given, image, SIZE)
    target = f"driver=luks,file.filename={image},key-secret=key"
    run("qemu-io", *SECRET, "--image-opts", target, "-c", "write -P 0x5a 0 1M")
    with Backend.open(
        str(image), session=session, format="luks", options={"key-secret": "key"}
    ) as disk:
        assert disk.read(0, 1 << 20) == b"\x5a" * (1 << 20)
        assert disk.read(0, SIZE) == qemu_content(image, tmp_path / "raw")


def test_cryptsetup_and_we(tmp_path, session):
    """cryptsetup makes a volume that opens here, and knows ours as a volume with this key."""
    key = tmp_path / "key"
    key.write_bytes(b"open sesame")
    theirs = tmp_path / "theirs.luks"
    theirs.write_bytes(bytes(4 << 20))
    run(
        "cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode", "--iter-time", "10",
        "--key-file", key, theirs,
    )  # fmt: skip
    with Backend.open(
        str(theirs), session=session, format="luks", options={"key-secret": "key"}
    ) as disk:
        assert disk.read(0, disk.size) == qemu_content(theirs, tmp_path / "raw")
    ours = tmp_path / "ours.luks"
    options = {"key-secret": "key", "iter-time": "10"}
    create_image(str(ours), "luks", session=session, options=options, size=SIZE)
    run("cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", key, ours)
    assert "Key Slot 0: ENABLED" in run("cryptsetup", "luksDump", ours)


def test_what_is_missing_is_said(tmp_path, session):
    image = str(tmp_path / "x.luks")
    with pytest.raises(LaminaError, match="Parameter 'key-secret' is required for cipher"):
        create_image(image, "luks", session=session, size=SIZE)
    options = {"key-secret": "key", "iter-time": "10"}
    create_image(image, "luks", session=session, options=options, size=SIZE)
    with pytest.raises(LaminaError, match="Parameter 'key-secret' is required for cipher"):
        Backend.open(image, session=session, format="luks")
    session.secrets.add("wrong", b"wrong")
    with pytest.raises(LaminaError, match="Invalid password, cannot unlock any keyslot"):
        Backend.open(image, session=session, format="luks", options={"key-secret": "wrong"})
    with Backend.open(image, session=session, format="luks", inspect=True) as disk:
        assert disk.info().encrypted
        assert disk.info().specific["slots"][0]["active"]


def test_key_slots_are_amended(tmp_path, session):
    """What our amend adds opens in QEMU, what it erases does not."""
    from lamina.block.registry import driver
    from lamina.formats.luks.options import LuksAmendOptions

    image = tmp_path / "ours.luks"
    options = {"key-secret": "key", "iter-time": "10"}
    create_image(str(image), "luks", session=session, options=options, size=SIZE)
    session.secrets.add("new", b"another one")

    def amend(key: str, **fields: object) -> None:
        with Backend.open(
            str(image), session=session, format="luks", writable=True, options={"key-secret": key}
        ) as disk:
            change = LuksAmendOptions(**fields)
            driver("luks").amend(disk.node, change, lambda done: None, force=False)

    def opens_in_qemu(passphrase: str) -> bool:
        command = ["qemu-io", "--object", f"secret,id=s,data={passphrase}", "--image-opts"]
        command += [f"driver=luks,file.filename={image},key-secret=s", "-c", "read 0 512"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    amend("key", state="active", new_secret="new", iter_time=10)
    assert opens_in_qemu("another one")
    assert opens_in_qemu("open sesame")
    amend("new", state="inactive", old_secret="key")
    assert opens_in_qemu("another one")
    assert not opens_in_qemu("open sesame")
    with pytest.raises(LaminaError, match="Attempt to erase the only active keyslot 1"):
        amend("new", state="inactive", keyslot=1)
