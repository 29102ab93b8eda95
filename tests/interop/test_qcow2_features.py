"""Every feature of qcow2 with every other: made, written to and amended by us and QEMU in turns."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.options import AmendOptions
from tests.unit.qcow2.features import (
    Choice,
    accepted,
    compresses,
    name_of,
    pairs,
    words_of,
)

pytestmark = pytest.mark.peer

KIB = 1 << 10
SECRET = ("--object", "secret,id=key,data=open sesame")


@pytest.fixture
def session() -> Session:
    secrets = Secrets()
    secrets.add("key", b"open sesame")
    return Session(secrets=secrets, warn=lambda text: None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Image:
    """An image file, and what its disk and snapshots hold."""

    def __init__(self, choice: Choice, session: Session, seed: int) -> None:
        self.choice = choice
        self.session = session
        self.rng = random.Random(seed)
        self.unit = choice["cluster_size"]
        # A few clusters, and a part of one.
        self.size = max(6 * self.unit, 64 * KIB) + 1024
        self.content = bytearray(self.size)
        self.snapshots: dict[str, bytes] = {}
        self.file = "image.qcow2"
        self.key = {"encrypt.key-secret": "key"} if choice["encrypt_format"] else {}

    # -- making ------------------------------------------------------------------------------------

    def make_base(self) -> list[str]:
        """The backing file, shorter than the image; how ``create`` is told of it."""
        kind = self.choice["backing"]
        if kind is None:
            return []
        length = self.size // 1024 * 512
        content = self.rng.randbytes(2000) * (length // 2000) + bytes(length % 2000)
        Path("base").write_bytes(content)
        if kind == "qcow2":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "base", "base.qcow2")
            Path("base.qcow2").rename("base")
        self.content[:length] = content
        return ["-b", "base", "-F", kind]

    def make(self, *, by_qemu: bool) -> None:
        backing = self.make_base()
        words = words_of(self.choice)
        if by_qemu:
            run(
                "qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", words, *backing,
                self.file, self.size,
            )  # fmt: skip
        else:
            options: dict[str, Any] = dict(word.split("=") for word in words.split(","))
            if backing:
                options |= {"backing_file": "base", "backing_fmt": backing[-1]}
            create_image(self.file, "qcow2", session=self.session, options=options, size=self.size)
        if self.choice["data_file"] == "raw" and self.key:
            # Nothing in a raw file is zeroes once it is decrypted.
            with self.open() as disk:
                self.content[:] = disk.read(0, self.size)

    # -- we ----------------------------------------------------------------------------------------

    def open(self, *, writable: bool = False) -> Backend:
        return Backend.open(
            self.file,
            session=self.session,
            format="qcow2",
            writable=writable,
            options=self.key,
            discard="unmap" if writable else None,
        )

    def we_write(self, operations: int) -> None:
        unit, rng = self.unit, self.rng
        with self.open(writable=True) as disk:
            for _ in range(operations):
                offset = rng.randrange(self.size // 512) * 512
                length = min(rng.choice([512, 4096, unit, 2 * unit]), self.size - offset)
                if rng.random() < 0.5:
                    offset = offset // unit * unit
                span = slice(offset, offset + length)
                match rng.randrange(6):
                    case 0:
                        flags = rng.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP])
                        disk.write_zeroes(offset, length, flags)
                        self.content[span] = bytes(length)
                    case 1:
                        disk.discard(offset, length)
                        self.content[span] = disk.read(offset, length)
                    case 2 if compresses(self.choice):
                        start = offset // unit * unit
                        data = bytes([rng.randrange(256)]) * min(unit, self.size - start)
                        disk.write_compressed([(start, memoryview(data))])
                        self.content[start : start + len(data)] = data
                    case _:
                        data = rng.randbytes(min(length, 5000)).ljust(length, b"x")
                        disk.write(offset, data)
                        self.content[span] = data

    def we_take_snapshot(self, name: str) -> None:
        with self.open(writable=True) as disk:
            DRIVER.create_snapshot(disk.node, SnapshotInfo("", name, 0, 1, 0, 0, 0))
        self.snapshots[name] = bytes(self.content)

    def we_amend(self, **options: Any) -> None:
        with self.open(writable=True) as disk:
            DRIVER.amend(disk.node, AmendOptions(**options), lambda part: None, force=False)

    def we_check(self) -> None:
        from lamina.block.driver import Fix

        with self.open() as disk:
            result = DRIVER.check(disk.node, Fix(), lambda line: None)
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
            assert disk.read(0, disk.size) == self.content
        for name, content in self.snapshots.items():
            with self.open() as disk:
                DRIVER.load_snapshot(disk.node, name)
                assert disk.read(0, disk.size) == content, name

    # -- QEMU --------------------------------------------------------------------------------------

    def named(self) -> tuple[str, ...]:
        """The image, as QEMU's tools are told to open it."""
        options = [f"{key}={value}" for key, value in self.key.items()]
        text = ",".join(["driver=qcow2", f"file.filename={self.file}", *options])
        return (*SECRET, "--image-opts", text)

    def qemu_writes(self) -> None:
        pattern = self.rng.randrange(1, 255)
        unit = self.unit
        offset = self.rng.randrange(self.size // unit) * unit
        commands = [f"write -P {pattern} {offset} 1536", f"write -z 0 {unit}"]
        self.content[offset : offset + 1536] = bytes([pattern]) * 1536
        self.content[:unit] = bytes(unit)
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", *self.named(), *words)

    def qemu_takes_snapshot(self, name: str) -> None:
        run("qemu-img", "snapshot", *self.named(), "-c", name)
        self.snapshots[name] = bytes(self.content)

    def qemu_amends(self, options: str) -> None:
        if "refcount_bits" in options and self.unit > 64 * KIB:
            # It asks every count of a block, of which such large ones have millions.
            return
        run("qemu-img", "amend", "-o", options, *self.named())

    def qemu_checks(self, *, snapshots: bool = True) -> None:
        assert "No errors were found" in run("qemu-img", "check", *self.named())
        self._qemu_reads((), bytes(self.content))
        if self.choice["data_file"] == "raw":
            assert Path("data").read_bytes()[: self.size] == self.content
        for name, content in self.snapshots.items() if snapshots else ():
            self._qemu_reads(("-l", f"snapshot.name={name}"), content)

    def _qemu_reads(self, which: tuple[str, ...], content: bytes) -> None:
        run("qemu-img", "convert", *which, *self.named(), "-O", "raw", "raw")
        assert Path("raw").read_bytes() == content, which


CHOICES = pairs()


@pytest.mark.parametrize("number", range(len(CHOICES)), ids=lambda at: name_of(CHOICES[at]))
def test_both_work_on_one_image(number: int, session: Session) -> None:
    choice = CHOICES[number]
    if choice["data_file"] == "raw":
        # All of a raw file is data: encrypted, what nobody has written reads as anything.
        choice = {**choice, "encrypt_format": None}
    image = Image(choice, session, number)
    # QEMU takes a second to find out how many iterations a LUKS key is worth.
    image.make(by_qemu=number % 2 == 1 and choice["encrypt_format"] != "luks")
    image.we_write(8)
    for snapshot in range(choice["snapshots"]):
        if snapshot:
            image.qemu_takes_snapshot("theirs")
        else:
            image.we_take_snapshot("ours")
        image.we_write(3)
    image.qemu_checks()
    image.qemu_writes()
    image.we_check()
    image.we_write(6)
    _amend(image, number)
    image.we_write(3)
    image.qemu_checks(snapshots=False)


def _amend(image: Image, number: int) -> None:
    """To the other version and back, by one and by the other."""
    choice = image.choice
    counts = max(choice["snapshots"].bit_length(), 3 if compresses(choice) else 0)
    if choice["compat"] == "0.10":
        image.we_amend(compat="1.1")
        image.qemu_amends("refcount_bits=64")
        image.we_amend(refcount_bits=1 << counts, lazy_refcounts=True)
        image.qemu_checks()
        return
    image.we_amend(refcount_bits=16)
    newer = choice["compression_type"] != "zlib" or choice["extended_l2"] or choice["data_file"]
    if not newer:
        image.we_amend(compat="0.10")
        image.qemu_checks()
        image.qemu_amends("compat=1.1")
    image.qemu_amends(f"refcount_bits={1 << counts}")
    image.we_check()


NEW = [
    choice
    for choice in pairs(acceptable=False)
    if not choice["snapshots"] and choice["encrypt_format"] != "luks"
]


@pytest.mark.parametrize("choice", NEW, ids=name_of)
def test_both_make_the_same_images(choice: Choice, session: Session) -> None:
    """The rule of what goes together is QEMU's, and ours."""
    image = Image(choice, session, 0)
    backing = image.make_base()
    command = ["qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", words_of(choice)]
    done = subprocess.run(
        [*command, *backing, "theirs", str(image.size)], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == accepted(choice), done.stderr
    if done.returncode:
        with pytest.raises(LaminaError) as refused:
            image.make(by_qemu=False)
        assert done.stderr == f"qemu-img: theirs: {refused.value}\n"
        return
    image.make(by_qemu=False)
    assert Path("theirs").read_bytes() == Path(image.file).read_bytes()
