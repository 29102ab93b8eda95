"""Many qcow2 images at once, each made of other features: we and QEMU take turns on them.

``python -m tests.interop.qcow2_turns`` does it with every combination that QEMU accepts (an hour or
two; ``--seconds`` of them in random order, ``--like backing=raw`` some), and with ``--new`` creates
every combination, accepted or not; ``test_qcow2_features`` does both with some in which any three
values of three features meet.

A turn of QEMU's is one process for a whole batch of images: qemu-io opens one after the other.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import groupby, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.driver import Fix, find_bitmap
from lamina.block.info import SnapshotInfo
from lamina.block.limits import WriteFlags
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.ciphers.luks import keys
from lamina.errors import LaminaError
from lamina.formats.qcow2 import DRIVER
from lamina.formats.qcow2.options import AmendOptions
from tests.unit.qcow2.features import (
    Choice,
    accepted,
    combinations_of_new,
    compresses,
    name_of,
    product,
    words_of,
)

KIB = 1 << 10
SECTOR = 512
SECRET = ("--object", "secret,id=key,data=open sesame")
BATCH = 24
"""Images that one qemu-io opens in turn."""


class Failure(AssertionError):
    """What one image came to."""


def session() -> Session:
    secrets = Secrets()
    secrets.add("key", b"open sesame")
    return Session(secrets=secrets, warn=lambda text: None)


def run(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def make_bases(size: int) -> None:
    """Backing files for disks of this length, shorter than these, in the working directory."""
    raw = Path(f"base-{size}.raw")
    if not raw.exists():
        raw.write_bytes(_expand(_base(size)))
        run("qemu-img", "convert", "-O", "qcow2", raw, raw.with_suffix(".qcow2"))


def _base(size: int) -> bytes:
    """By sectors: pieces that end anywhere in clusters."""
    sectors = size // SECTOR // 2
    piece = max(sectors // 5, 3)
    return bytes(1 + number // piece for number in range(sectors))


def _expand(sectors: bytes | bytearray) -> bytes:
    return b"".join(bytes([value]) * (SECTOR * len(list(run))) for value, run in groupby(sectors))


class Image:
    """An image file in the working directory, and what it should hold.

    Sectors are of one value each, so that qemu-io can tell whether they are right.
    """

    def __init__(self, number: int, choice: Choice, session: Session) -> None:
        self.number = number
        self.choice = choice
        self.session = session
        self.rng = random.Random(number)
        self.file = f"{number}.qcow2"
        self.data = f"{number}.data"
        self.unit: int = choice["cluster_size"]
        # Some clusters, and a part of one.
        self.size = min(max(4 * self.unit, 64 * KIB), 4096 * KIB) + 2 * SECTOR
        # QEMU takes seconds to find out how many iterations a LUKS key is worth.
        self.by_us = number % (16 if choice["encrypt_format"] == "luks" else 2) != 1
        """Who makes the image; the other amends it."""
        self.sectors = bytearray(self.size // SECTOR)
        self.snapshots: dict[str, bytes] = {}
        self.granularity = min(max(self.unit, 4 * KIB), 64 * KIB)
        self.dirty: set[int] | None = None
        """What the bitmap, if there is one, has recorded: numbers of its bits."""
        self.value = 100
        self.key = {"encrypt.key-secret": "key"} if choice["encrypt_format"] else {}

    def __str__(self) -> str:
        return f"{self.file}: {name_of(self.choice)}"

    # -- what is expected --------------------------------------------------------------------------

    def _next(self) -> int:
        self.value = self.value % 250 + 1
        return self.value

    def _set(self, offset: int, length: int, value: int) -> None:
        first, count = offset // SECTOR, length // SECTOR
        self.sectors[first : first + count] = bytes([value]) * count
        self._mark(offset, length)

    def _mark(self, offset: int, length: int) -> None:
        if self.dirty is not None:
            step = self.granularity
            self.dirty.update(range(offset // step, (offset + length - 1) // step + 1))

    def _cluster(self) -> tuple[int, int]:
        """Any cluster: offset and length."""
        offset = self.rng.randrange(-(-self.size // self.unit)) * self.unit
        return offset, min(self.unit, self.size - offset)

    def _part(self) -> tuple[int, int]:
        """Some sectors of a cluster or two."""
        offset = self.rng.randrange(self.size // SECTOR) * SECTOR
        length = self.rng.choice([SECTOR, self.unit // 32, self.unit // 2, self.unit + SECTOR])
        return offset, min(max(length // SECTOR, 1) * SECTOR, self.size - offset)

    # -- making ------------------------------------------------------------------------------------

    def make(self) -> None:
        choice = self.choice
        if self.by_us:
            self.we_create()
        elif said := self.qemu_creates():
            raise Failure(said)
        if choice["backing"]:
            held = _base(self.size)
            self.sectors[: len(held)] = held
        whole = choice["preallocation"] != "off" or choice["data_file"] == "raw"
        if self.key and whole and not choice["backing"]:
            # What nobody has written reads as anything.
            with self.open(writable=True) as disk:
                self._write(disk, 0, self.size)

    def _base(self) -> list[str]:
        kind = self.choice["backing"]
        if kind:
            make_bases(self.size)
        return [f"base-{self.size}.{kind}", kind] if kind else []

    def we_create(self) -> None:
        words = words_of(self.choice, self.data)
        options: dict[str, Any] = dict(word.split("=") for word in words.split(","))
        options |= zip(("backing_file", "backing_fmt"), self._base(), strict=False)
        create_image(self.file, "qcow2", session=self.session, options=options, size=self.size)

    def qemu_creates(self) -> str:
        """What it has to say against it."""
        words = ["create", "-q", *SECRET, "-f", "qcow2", "-o", words_of(self.choice, self.data)]
        for flag, value in zip(("-b", "-F"), self._base(), strict=False):
            words += [flag, value]
        done = subprocess.run(
            ["qemu-img", *words, self.file, str(self.size)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr

    def both_create(self) -> None:
        """The rule of what goes together is QEMU's, and ours; so is what comes out."""
        said = self.qemu_creates()
        if bool(said) == accepted(self.choice):
            raise Failure(f"not what our tests expect: {said}")
        theirs = b"" if said else Path(self.file).read_bytes()
        self.remove()
        refused = ""
        try:
            self.we_create()
        except LaminaError as error:
            refused = f"qemu-img: {self.file}: {error}\n"
        if refused != said:
            raise Failure(f"QEMU says {said!r}, we {refused!r}")
        if said:
            return
        ours = Path(self.file).read_bytes()
        full = self.choice["preallocation"] in ("falloc", "full") and not self.choice["data_file"]
        if len(ours) != len(theirs) if full else ours != theirs:
            # QEMU grows a full image out of an empty one: its refcount table lies elsewhere.
            raise Failure("the new images differ")

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

    def we_begin(self) -> None:
        with self.open(writable=True) as disk:
            self._we_change(disk)
            if self.choice["bitmaps"]:
                DRIVER.add_bitmap(disk.node, "bits", None)
                self.dirty = set()
            if self.choice["snapshots"]:
                self._we_take_snapshot(disk, "ours")
            self._we_change(disk)

    def _we_take_snapshot(self, disk: Backend, name: str) -> None:
        DRIVER.create_snapshot(disk.node, SnapshotInfo("", name, 0, 1, 0, 0, 0))
        self.snapshots[name] = bytes(self.sectors)

    def _we_change(self, disk: Backend) -> None:
        self._write(disk, *self._part())
        self._write(disk, *self._cluster())
        offset, length = self._part()
        disk.write_zeroes(offset, length, WriteFlags.NONE)
        self._set(offset, length, 0)
        offset, length = self._cluster()
        disk.write_zeroes(offset, length, WriteFlags.MAY_UNMAP)
        self._set(offset, length, 0)
        if compresses(self.choice):
            for _ in range(2):
                offset, length = self._cluster()
                value = self._next()
                disk.write_compressed([(offset, memoryview(bytes([value]) * length))])
                self._set(offset, length, value)
        offset, length = self._cluster()
        disk.discard(offset, length)
        self._discarded(offset, length, disk.read(offset, length))
        self._write(disk, *self._part())

    def _write(self, disk: Backend, offset: int, length: int) -> None:
        value = self._next()
        disk.write(offset, bytes([value]) * length)
        self._set(offset, length, value)

    def _discarded(self, offset: int, length: int, found: bytes) -> None:
        """It reads as zeroes now, or as it did."""
        first, count = offset // SECTOR, length // SECTOR
        if not any(found):
            self.sectors[first : first + count] = bytes(count)
        elif found != _expand(self.sectors[first : first + count]):
            raise Failure(f"{self}: discarded at {offset}, reads as something else")
        self._mark(offset, length)

    def we_go_on(self) -> None:
        """See what QEMU left, and change it again."""
        self.we_look()
        with self.open(writable=True) as disk:
            if self.snapshots and self._applies():
                DRIVER.apply_snapshot(disk.node, "theirs")
                self.sectors[:] = self.snapshots["theirs"]
            if self.snapshots:
                DRIVER.delete_snapshot(disk.node, "ours")
                del self.snapshots["ours"]
            self._we_change(disk)
            if not self.by_us:
                self._we_amend(disk)

    def _applies(self) -> bool:
        """Whether snapshots can be applied: bitmaps forbid it, and what two snapshots and the disk
        share is counted once more on the way."""
        return self.dirty is None and self.choice["refcount_bits"] > 2

    def _we_amend(self, disk: Backend) -> None:
        for changes in self._amendments():
            options = AmendOptions(**changes)
            DRIVER.amend(disk.node, options, lambda part: None, force=False)

    def _amendments(self) -> list[dict[str, Any]]:
        """To another version or width of counts, as far as the features allow."""
        choice = self.choice
        counts = max(choice["snapshots"].bit_length(), 3 if compresses(choice) else 0)
        if choice["compat"] == "0.10":
            return [{"compat": "1.1"}, {"refcount_bits": 1 << counts}]
        newer = ("extended_l2", "data_file", "bitmaps", "lazy_refcounts")
        if choice["compression_type"] != "zlib" or any(choice[name] for name in newer):
            return [{"refcount_bits": 64 if choice["refcount_bits"] < 64 else 1 << counts}]
        return [{"refcount_bits": 16}, {"compat": "0.10"}]

    def we_look(self) -> None:
        self._we_look_at(None, self.sectors)
        for name, content in self.snapshots.items():
            self._we_look_at(name, content)

    def _we_look_at(self, snapshot: str | None, sectors: bytes | bytearray) -> None:
        lines: list[str] = []
        with self.open() as disk:
            if snapshot is not None:
                DRIVER.load_snapshot(disk.node, snapshot)
            else:
                found = DRIVER.check(disk.node, Fix(), lines.append)
                if (found.corruptions, found.leaks, found.check_errors) != (0, 0, 0):
                    raise Failure(f"{self}: our check: {lines}")
                self._check_bitmap(disk)
            if disk.read(0, disk.size) != _expand(sectors):
                raise Failure(f"{self}: we read something else ({snapshot})")
        if snapshot is None and self.choice["data_file"] == "raw" and not self.key:
            raw = Path(self.data).read_bytes()[: self.size]
            if raw != _expand(sectors):
                raise Failure(f"{self}: the data file is not raw")

    def _check_bitmap(self, disk: Backend) -> None:
        if self.dirty is not None:
            step = self.granularity
            found = set[int]()
            for offset, length in find_bitmap(disk.node, "bits").ranges():
                found.update(range(offset // step, (offset + length - 1) // step + 1))
            if found != self.dirty:
                raise Failure(f"{self}: bits {sorted(found ^ self.dirty)} differ")

    # -- QEMU --------------------------------------------------------------------------------------

    def named(self) -> str:
        """The image, as QEMU's tools are told to open it."""
        options = [f"{key}={value}" for key, value in self.key.items()]
        return ",".join(["driver=qcow2", f"file.filename={self.file}", "discard=unmap", *options])

    def qemu_reads(self) -> list[str]:
        """Commands for qemu-io that fail unless the disk holds what it should."""
        commands = []
        offset = 0
        for value, sectors in groupby(self.sectors):
            length = SECTOR * len(list(sectors))
            commands.append(f"read -q -P {value} {offset} {length}")
            offset += length
        return commands

    def qemu_changes(self) -> list[str]:
        """The same for some changes of the disk."""
        # It compresses only where nothing is, and version 2 has zeroes over a backing file there.
        cluster = self._cluster()
        changes = [("-z -u", cluster, 0)]
        if compresses(self.choice) and not (self._version() == 2 and self.choice["backing"]):
            changes.append(("-c", cluster, self._next()))
        changes += [("", self._part(), self._next()), ("-z", self._part(), 0)]
        changes.append(("", self._part(), self._next()))
        commands = []
        for flags, (offset, length), value in changes:
            pattern = f"-P {value}" if value else ""
            commands.append(f"write -q {flags} {pattern} {offset} {length}")
            self._set(offset, length, value)
        return commands

    def _version(self) -> int:
        with open(self.file, "rb") as file:
            return file.read(8)[7]

    def qemu_image(self, *words: object) -> str:
        """One run of qemu-img, which is told ``words`` before the image."""
        return run("qemu-img", *words, *SECRET, "--image-opts", self.named())

    def qemu_goes_on(self) -> None:
        """Snapshots: QEMU takes one, and reads or applies ours."""
        if not self.snapshots:
            return
        self.qemu_image("snapshot", "-c", "theirs")
        self.snapshots["theirs"] = bytes(self.sectors)
        if self._applies():
            self.qemu_image("snapshot", "-a", "ours")
            self.sectors[:] = self.snapshots["ours"]
            return
        options = ("-l", "snapshot.name=ours", *SECRET, "--image-opts", self.named())
        run("qemu-img", "convert", *options, "-O", "raw", "raw")
        if Path("raw").read_bytes() != _expand(self.snapshots["ours"]):
            raise Failure(f"{self}: QEMU reads something else in our snapshot")

    def qemu_amends(self) -> None:
        # It asks every count of a block, of which large ones have millions: seconds.
        if self.by_us and self.unit <= 16 * KIB and self.number % 8 == 0:
            for changes in self._amendments():
                words = ",".join(f"{name}={value}" for name, value in changes.items())
                # The zeroes that it writes for the older version are not encrypted, and those that
                # snapshots share get entries that claim them for the disk alone.
                if words != "compat=0.10" or not (self.key or self.snapshots):
                    self.qemu_image("amend", "-o", words)

    def qemu_checks(self) -> None:
        if "No errors were found" not in (said := self.qemu_image("check")):
            raise Failure(f"{self}: QEMU's check: {said}")

    def remove(self) -> None:
        for name in (self.file, self.data):
            Path(name).unlink(missing_ok=True)


class Turns:
    """What is done with some images, step by step, and what went wrong."""

    def __init__(self, images: Sequence[Image]) -> None:
        self.images = images
        self.wrong: dict[Image, str] = {}

    @property
    def right(self) -> list[Image]:
        return [image for image in self.images if image not in self.wrong]

    def each(self, step: Callable[[Image], None]) -> None:
        for image in self.right:
            try:
                step(image)
            except Exception as error:
                what = f"{step.__name__}: {type(error).__name__}: {error}"
                self.wrong[image] = f"{image}: {what}"

    def qemu_io(self) -> None:
        """QEMU looks at all and changes them."""
        images = self.right
        if said := _qemu_io(images, lambda image: image.qemu_reads() + image.qemu_changes()):
            # One of these: those whose disks are not what they should be by now, if any.
            found = {image: _qemu_io([image], Image.qemu_reads) for image in images}
            for image in [image for image in images if found[image]] or images:
                self.wrong[image] = f"{image}: qemu-io: {found[image] or said[:500]}"

    def take(self) -> None:
        self.each(Image.make)
        self.each(Image.we_begin)
        self.each(Image.qemu_checks)
        self.qemu_io()
        self.each(Image.qemu_goes_on)
        self.qemu_io()
        self.each(Image.we_go_on)
        self.each(Image.qemu_amends)
        self.qemu_io()
        self.each(Image.qemu_checks)
        self.each(Image.we_look)


def _qemu_io(images: Sequence[Image], commands: Callable[[Image], list[str]]) -> str:
    """What it has to say, which should be nothing."""
    words = []
    for image in images:
        for command in (f"open -o {image.named()}", *commands(image), "close"):
            words += ["-c", command]
    done = subprocess.run(["qemu-io", *SECRET, *words], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    return f"status {done.returncode}: {said}" if done.returncode or said else ""


# -- all of them -----------------------------------------------------------------------------------


Batch = list[tuple[int, Choice]]
"""Numbers, which decide what is done with an image, and what it is made of."""


def batches(choices: Sequence[Choice]) -> Iterator[Batch]:
    numbered = list(enumerate(choices))
    for start in range(0, len(numbered), BATCH):
        yield numbered[start : start + BATCH]


def do_batch(batch: Batch, *, new: bool = False) -> list[str]:
    """What went wrong, in the working directory; ``new``: with creating them alone.

    Keys are cheap to make, and opened again for nothing.
    """
    chain = lru_cache(2 * BATCH)(keys._diffused_chain)
    with (
        patch("lamina.ciphers.luks.create.iterations_per_second", return_value=1000),
        patch.object(keys, "_diffused_chain", chain),
    ):
        turns = Turns([Image(number, choice, session()) for number, choice in batch])
        if new:
            turns.each(Image.both_create)
        else:
            turns.take()
    for image in turns.images:
        image.remove()
    return list(turns.wrong.values())


def _in_own_folder(batch: Batch, new: bool) -> list[str]:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        os.chdir(folder)
        try:
            return do_batch(batch, new=new)
        finally:
            os.chdir("/")


def _memory() -> str | None:
    """Where files are in memory, if there is such a place."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    parser.add_argument("--skip", type=int, default=0, help="combinations done before")
    parser.add_argument("--new", action="store_true", help="create them, and no more")
    parser.add_argument("--like", default="", help="NAME=VALUE[,…]: only these combinations")
    given = parser.parse_args(arguments)
    like = dict(word.split("=") for word in given.like.split(",") if word)
    choices = [
        choice
        for choice in (combinations_of_new() if given.new else product())
        if all(str(choice[name]) == value for name, value in like.items())
    ]
    # In an order that is random and always the same, so that any part of it is a fair one.
    random.Random(1).shuffle(choices)
    start, done, wrong = time.monotonic(), given.skip, 0
    todo = [batch for batch in batches(choices) if batch[0][0] >= given.skip]
    with ProcessPoolExecutor(given.jobs) as pool:
        results = pool.map(_in_own_folder, todo, repeat(given.new))
        for batch, found in zip(todo, results, strict=True):
            done += len(batch)
            wrong += len(found)
            for line in found:
                print(line, flush=True)
            print(f"\r{done} of {len(choices)}, {wrong} wrong", end="", file=sys.stderr)
            if time.monotonic() - start > given.seconds:
                pool.shutdown(cancel_futures=True)
                break
    print(file=sys.stderr)
    print(f"{done} of {len(choices)} combinations, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
