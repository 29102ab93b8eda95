"""LUKS volumes between us, QEMU and cryptsetup."""

from __future__ import annotations

import itertools
import random
import subprocess

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.registry import driver
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.ciphers.luks.keys import STRIPES
from lamina.errors import LaminaError
from lamina.formats.luks.options import LuksAmendOptions

pytestmark = pytest.mark.peer

SIZE = 3 << 20
SECRET = ["--object", "secret,id=key,data=open sesame"]
COMBINATIONS = [
    {},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv", "cipher-alg": "aes-128", "hash-alg": "sha1"},
    {"cipher-mode": "ctr", "hash-alg": "sha512"},
    {"cipher-mode": "ecb", "cipher-alg": "aes-128", "ivgen-alg": "plain"},
]
CIPHERS = ("aes-128", "aes-192", "aes-256", "cast5-128")
"""Those of QEMU that the library has."""
HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "md5")
ESSIV_KEYS = {"md5": 16, "sha256": 32}
"""Hashes whose digests are keys of AES, in bytes; of CAST5 only the shorter one is."""


def accepted(cipher: str, mode: str, ivgen: str, iv_hash: str | None) -> bool:
    """Whether QEMU makes such a volume."""
    if cipher == "cast5-128" and mode == "xts":
        return False
    if ivgen == "essiv":
        size = ESSIV_KEYS.get(iv_hash or "sha256", 0)
        return size == 16 if cipher == "cast5-128" else size > 0
    return True


def qemu_opens(cipher: str, bits: int) -> bool:
    """It knows no mode without an IV generator, and an assertion of its own ends it where the split
    key does not fill its last sector."""
    return cipher != "aes-ecb" and bits // 8 * STRIPES % 512 == 0


def cryptsetup_opens(cipher: str, mode: str, bits: int, hash_name: str) -> bool:
    """Without the help of the kernel, which it asks for what OpenSSL has not."""
    able = mode in ("cbc", "ctr") or (mode == "xts" and bits != 2 * 192)
    return able and cipher.startswith("aes") and hash_name != "md5"


EVERYTHING = [
    (cipher, mode, ivgen, iv_hash)
    for cipher, mode in itertools.product(CIPHERS, ("xts", "cbc", "ctr", "ecb"))
    for ivgen, iv_hash in (
        ("plain", None), ("plain64", None), ("essiv", "md5"), ("essiv", "sha256"),
        ("essiv", "sha1"),
    )
]  # fmt: skip


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


@pytest.mark.parametrize(
    "number", range(len(EVERYTHING)), ids=lambda n: "-".join(map(str, EVERYTHING[n]))
)
def test_every_combination(tmp_path, session, number):
    """Made by us, opened by QEMU and cryptsetup, or refused by QEMU too in the same words."""
    cipher, mode, ivgen, iv_hash = EVERYTHING[number]
    options = {
        "key-secret": "key", "iter-time": "0", "cipher-alg": cipher, "cipher-mode": mode,
        "ivgen-alg": ivgen, "hash-alg": HASHES[number % len(HASHES)],
    }  # fmt: skip
    if iv_hash is not None:
        options["ivgen-hash-alg"] = iv_hash
    image = tmp_path / "ours.luks"
    bits = int(cipher.partition("-")[2]) * (2 if mode == "xts" else 1)
    if not accepted(cipher, mode, ivgen, iv_hash):
        given = ",".join(f"{key}={value}" for key, value in options.items())
        theirs = tmp_path / "theirs.luks"
        command = ["qemu-img", "create", "-q", *SECRET, "-f", "luks", "-o", given, theirs, "1M"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        with pytest.raises(LaminaError) as refused:
            create_image(str(image), "luks", session=session, options=options, size=1 << 16)
        assert done.stderr == f"qemu-img: {theirs}: {refused.value}\n"
        return
    create_image(str(image), "luks", session=session, options=options, size=1 << 16)
    content = bytearray(random.Random(number).randbytes(1 << 16))
    with Backend.open(
        str(image), session=session, format="luks", writable=True, options={"key-secret": "key"}
    ) as disk:
        disk.write(0, content)
    if qemu_opens(f"{cipher}-{mode}", bits):
        target = f"driver=luks,file.filename={image},key-secret=key"
        run("qemu-io", *SECRET, "--image-opts", target, "-c", "write -P 0x5a 1024 5120")
        content[1024:6144] = b"\x5a" * 5120
        assert qemu_content(image, tmp_path / "raw") == content
    if cryptsetup_opens(cipher, mode, bits, options["hash-alg"]):
        key = tmp_path / "key"
        key.write_bytes(b"open sesame")
        run("cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", key, image)
    with Backend.open(
        str(image), session=session, format="luks", options={"key-secret": "key"}
    ) as disk:
        assert disk.read(0, disk.size) == content


@pytest.mark.parametrize(
    ("cipher", "bits", "hash_name"),
    [
        ("aes-xts-plain64", 256, "sha256"),
        ("aes-xts-plain64", 512, "sha512"),
        ("aes-xts-plain", 512, "ripemd160"),
        ("aes-cbc-essiv:sha256", 256, "sha1"),
        ("aes-cbc-essiv:sha256", 128, "sha384"),
        ("aes-cbc-plain", 128, "sha224"),
        ("aes-cbc-plain64", 192, "sha256"),
        ("aes-ecb", 256, "sha256"),
    ],
)
def test_volumes_of_cryptsetup(tmp_path, session, cipher, bits, hash_name):
    """Any of its volumes opens here with any of its keys, and knows a key that we add."""
    keys = []
    for name, passphrase in (("first", b"first key"), ("second", b"open sesame")):
        keys.append(tmp_path / name)
        keys[-1].write_bytes(passphrase)
    image = tmp_path / "volume"
    image.write_bytes(bytes(4 << 20))
    fast = ("--batch-mode", "--pbkdf-force-iterations", "1000")
    run(
        "cryptsetup", "luksFormat", "--type", "luks1", *fast, "--cipher", cipher,
        "--key-size", bits, "--hash", hash_name, "--key-file", keys[0], image,
    )  # fmt: skip
    run(
        "cryptsetup", "luksAddKey", *fast, "--key-slot", 5, "--key-file", keys[0], image, keys[1]
    )
    with Backend.open(
        str(image), session=session, format="luks", writable=True, options={"key-secret": "key"}
    ) as disk:
        content = random.Random(bits).randbytes(disk.size)
        disk.write(0, content)
        session.secrets.add("new", b"a third one")
        change = LuksAmendOptions(state="active", new_secret="new", iter_time=1)
        driver("luks").amend(disk.node, change, lambda done: None, force=False)
    with Backend.open(
        str(image), session=session, format="luks", options={"key-secret": "new"}
    ) as disk:
        assert disk.read(0, disk.size) == content
    if qemu_opens(cipher, bits):
        assert qemu_content(image, tmp_path / "raw") == content
    third = tmp_path / "third"
    third.write_bytes(b"a third one")
    run("cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", third, image)


def test_detached_headers(tmp_path, session):
    """Made by us and by cryptsetup, opened by us, QEMU and cryptsetup."""
    key = tmp_path / "key"
    key.write_bytes(b"open sesame")
    ours, theirs = tmp_path / "ours.header", tmp_path / "theirs.header"
    options = {"key-secret": "key", "iter-time": "1", "detached-header": "on"}
    create_image(str(ours), "luks", session=session, options=options, size=SIZE)
    run("cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", key, ours)
    payload = tmp_path / "payload"
    for header in (ours, theirs):
        payload.write_bytes(bytes(SIZE))
        if header is theirs:
            run(
                "cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode",
                "--pbkdf-force-iterations", "1000", "--key-file", key, "--header", header, payload,
            )  # fmt: skip
        given = {"key-secret": "key", "header.driver": "file", "header.filename": str(header)}
        content = random.Random(5).randbytes(SIZE)
        with Backend.open(
            str(payload), session=session, format="luks", writable=True, options=given
        ) as disk:
            assert disk.size == SIZE
            assert disk.info().specific["detached-header"]
            disk.write(0, content)
        assert payload.read_bytes() != content
        target = (
            f"driver=luks,key-secret=key,file.driver=file,file.filename={payload},"
            f"header.driver=file,header.filename={header}"
        )
        raw = tmp_path / "raw"
        run("qemu-img", "convert", *SECRET, "--image-opts", target, "-O", "raw", raw)
        assert raw.read_bytes() == content


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


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_key_slots_are_amended(tmp_path, session, format):
    """By us and by QEMU, in turns: what one adds opens for the other, what it erases does not."""
    image = tmp_path / "image"
    prefix = "encrypt." if format == "qcow2" else ""
    options = {f"{prefix}key-secret": "key", f"{prefix}iter-time": "1"}
    if format == "qcow2":
        options["encrypt.format"] = "luks"
    create_image(str(image), format, session=session, options=options, size=SIZE)
    passphrases = {"key": "open sesame", "new": "another one", "third": "a third one"}
    secrets = []
    for name, passphrase in passphrases.items():
        if name != "key":
            session.secrets.add(name, passphrase.encode())
        secrets += ["--object", f"secret,id={name},data={passphrase}"]

    def target(key: str) -> str:
        return f"driver={format},file.filename={image},{prefix}key-secret={key}"

    def opened(key: str, *, writable: bool = False) -> Backend:
        given = {f"{prefix}key-secret": key}
        return Backend.open(
            str(image), session=session, format=format, writable=writable, options=given
        )

    def we_amend(key: str, **fields: object) -> None:
        amend_options = driver(format).AmendOptions
        names = {name: f"{prefix.replace('.', '_')}{name}" for name in fields}
        with opened(key, writable=True) as disk:
            change = amend_options(**{names[name]: value for name, value in fields.items()})
            driver(format).amend(disk.node, change, lambda done: None, force=False)

    def qemu_amends(key: str, **fields: object) -> str:
        words = [f"{prefix}{name.replace('_', '-')}={value}" for name, value in fields.items()]
        command = ["qemu-img", "amend", *secrets, "-o", ",".join(words)]
        command += ["--image-opts", target(key)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    def opens(*keys: str) -> None:
        """These open the image, for both, and no others do."""
        for key in passphrases:
            command = ["qemu-io", "-r", *secrets, "--image-opts", target(key), "-c", "read 0 512"]
            theirs = subprocess.run(command, capture_output=True, check=False).returncode == 0
            try:
                opened(key).close()
                ours = True
            except LaminaError:
                ours = False
            assert (ours, theirs) == (key in keys,) * 2, key

    we_amend("key", state="active", new_secret="new", iter_time=1)
    opens("key", "new")
    assert qemu_amends("new", state="active", new_secret="third", iter_time=1) == ""
    opens("key", "new", "third")
    assert qemu_amends("third", state="inactive", old_secret="key") == ""
    opens("new", "third")
    we_amend("new", state="inactive", keyslot=2)
    opens("new")
    said = qemu_amends("new", state="inactive", keyslot=1)
    with pytest.raises(LaminaError, match="Attempt to erase the only active keyslot 1") as refused:
        we_amend("new", state="inactive", keyslot=1)
    assert str(refused.value) in said
    opens("new")
