"""``rebase``, ``commit`` and ``convert`` over a chain five deep, of a different kind in each layer.

Compressed clusters with a snapshot and bitmaps; subclusters; an external data file with clusters of
another size, shorter than what is below; encryption, named by ``json:``; and a plain one on top.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import LaminaImg, Outcome, qemu_img

pytestmark = pytest.mark.peer

SECRET = ("--object", "secret,id=s,data=abc")
ENCRYPTED = "driver=qcow2,file.filename=d.qcow2,encrypt.key-secret=s"
LAYERS = ("a", "b", "c", "d", "e")
BESIDE = ("short", "long", "blank")


def make(folder: Path) -> None:
    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        assert "failed" not in done.stdout + done.stderr

    def img(command: str) -> None:
        words = shlex.split(command)
        run("qemu-img", words[0], *SECRET, *words[1:])

    def io(image: str, *commands: str) -> None:
        options = image if "=" in image else f"driver=qcow2,file.filename={image}"
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", *SECRET, *words, "--image-opts", options)

    img("create -f qcow2 a.qcow2 1M")
    io(
        "a.qcow2",
        *("write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 300k 100k"),
        "write -z 512k 64k",
    )
    img("snapshot -c snap a.qcow2")
    io("a.qcow2", "write -P 77 0 8k", "discard 300k 64k")
    img("bitmap --add a.qcow2 b0")
    img("bitmap --add --disable -g 4k a.qcow2 b1")
    io("a.qcow2", "write -P 78 40k 8k")
    img("create -f qcow2 -o extended_l2=on -b a.qcow2 -F qcow2 b.qcow2 2M")
    io(
        "b.qcow2",
        *("write -P 4 6k 10k", "write -P 5 300k 2k", "write -z 330k 6k", "write -P 6 1500k 70k"),
    )
    img(
        "create -f qcow2 -o data_file=c.data,cluster_size=4k -b b.qcow2 -F qcow2 c.qcow2 1536k"
    )
    io("c.qcow2", "write -P 7 64k 8k", "write -P 8 700k 64k", "write -z 128k 64k")
    encryption = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    img(f"create -f qcow2 -o {encryption} -b c.qcow2 -F qcow2 d.qcow2 3M")
    io(ENCRYPTED, "write -P 9 0 4k", "write -P 10 2500k 100k", "write -z 704k 8k")
    name = {"driver": "qcow2", "encrypt.key-secret": "s", "file.filename": "d.qcow2"}
    img(f"create -f qcow2 -b 'json:{json.dumps(name)}' -F qcow2 e.qcow2 4M")
    io("e.qcow2", "write -P 11 100k 30k", "write -c -P 12 3M 64k", "write -z 1500k 8k")
    img("create -f qcow2 short.qcow2 256k")
    io("short.qcow2", "write -P 9 0 4k", "write -P 1 64k 100k")
    img("create -f qcow2 long.qcow2 6M")
    io(
        "long.qcow2",
        *("write -P 9 0 4k", "write -P 1 64k 100k", "write -P 13 3M 200k", "write -P 14 5M 64k"),
    )
    img("create -f qcow2 blank.qcow2 4M")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    make(folder)
    return folder


class Twins:
    """The images for our tool, and the same for QEMU's."""

    def __init__(
        self,
        images: Path,
        tmp_path: Path,
        in_folder: Callable[[Path], None],
        lamina_img: LaminaImg,
    ) -> None:
        self.images = images
        self.ours, self.theirs = tmp_path / "ours", tmp_path / "theirs"
        self._in_folder = in_folder
        self._lamina_img = lamina_img
        for copy in (self.ours, self.theirs):
            subprocess.run(["cp", "-r", "--sparse=always", images, copy], check=True)

    def run(self, command: str) -> tuple[Outcome, Outcome]:
        words = shlex.split(command)
        words[1:1] = SECRET
        self._in_folder(self.theirs)
        theirs = qemu_img(*words)
        self._in_folder(self.ours)
        return self._lamina_img(*words), theirs

    def changed(self) -> list[str]:
        """The images that either tool wrote to, by their names without a suffix."""
        names = set()
        for folder in (self.ours, self.theirs):
            for path in folder.iterdir():
                before = self.images / path.name
                if not before.exists() or before.read_bytes() != path.read_bytes():
                    names.add(path.stem)
        return sorted(names)

    def seen(self, folder: Path, name: str, *, allocation: bool) -> Any:
        """What QEMU finds in an image: its content, how sound it is, where it is allocated."""
        options = ENCRYPTED if name == "d" else f"driver=qcow2,file.filename={name}.qcow2"

        def look(command: str, *rest: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["qemu-img", command, *SECRET, "--image-opts", options, *rest],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )

        assert look("check").returncode == 0, name
        assert look("convert", "-O", "raw", "seen").returncode == 0, name
        content = (folder / "seen").read_bytes()
        (folder / "seen").unlink()
        rows = []
        for row in json.loads(look("map", "--output=json").stdout) if allocation else ():
            row["zero"] = row["zero"] and not row["data"]
            rows += [
                (row["start"] + start, row["depth"], row["zero"], row["data"], row["compressed"])
                for start in range(0, row["length"], 2048)
            ]
        return content, rows

    def assert_equal(self, *, allocation: bool = True) -> None:
        for name in self.changed():
            ours, theirs = (
                self.seen(folder, name, allocation=allocation)
                for folder in (self.ours, self.theirs)
            )
            assert ours[1] == theirs[1], name
            assert ours[0] == theirs[0], name


@pytest.fixture
def twins(
    images: Path, tmp_path: Path, in_folder: Callable[[Path], None], lamina_img: LaminaImg
) -> Twins:
    return Twins(images, tmp_path, in_folder, lamina_img)


REBASES = [
    "rebase -b long.qcow2 -F qcow2 e.qcow2",
    "rebase -c -b long.qcow2 -F qcow2 e.qcow2",
    "rebase -q -b short.qcow2 -F qcow2 e.qcow2",
    "rebase -b b.qcow2 -F qcow2 e.qcow2",
    "rebase -t none -T none -b a.qcow2 -F qcow2 e.qcow2",
    "rebase -U -c -b a.qcow2 -F qcow2 e.qcow2",
    "rebase -b '' e.qcow2",
    "rebase -b a.qcow2 -F qcow2 c.qcow2",
    "rebase -b short.qcow2 -F qcow2 c.qcow2",
    "rebase -b '' b.qcow2",
    "rebase -b long.qcow2 -F qcow2 b.qcow2",
    "rebase -b long.qcow2 -F qcow2 short.qcow2",
    "rebase -b e.qcow2 -F qcow2 short.qcow2",
    f"rebase --image-opts -b '' {ENCRYPTED}",
]


@pytest.mark.parametrize("command", REBASES)
def test_rebase(command: str, twins: Twins) -> None:
    ours, theirs = twins.run(command)
    assert ours == theirs == Outcome(0, "", "")
    (name,) = twins.changed()
    twins.assert_equal()
    content = twins.seen(twins.ours, name, allocation=False)
    assert content == twins.seen(twins.images, name, allocation=False)


def test_subclusters_are_rebased_with_compression(twins: Twins) -> None:
    """Where an assertion of QEMU's ends it."""
    ours, theirs = twins.run("rebase -c -b short.qcow2 -F qcow2 b.qcow2")
    assert ours == Outcome(0, "", "")
    assert theirs.code != 0
    content = twins.seen(twins.ours, "b", allocation=False)
    assert content == twins.seen(twins.images, "b", allocation=False)


@pytest.mark.parametrize(
    "command",
    [
        "rebase -u -b a.qcow2 -F qcow2 e.qcow2",
        "rebase -u -b '' e.qcow2",
        f"rebase -u --image-opts -b b.qcow2 -F qcow2 {ENCRYPTED}",
        "rebase --image-opts -b b.qcow2 -F qcow2 driver=qcow2,file.filename=c.qcow2",
    ],
)
def test_the_name_alone(command: str, twins: Twins) -> None:
    ours, theirs = twins.run(command)
    assert ours == theirs == Outcome(0, "", "")
    twins.assert_equal()


COMMITS = [
    "commit e.qcow2",
    "commit -d e.qcow2",
    "commit -q -b c.qcow2 e.qcow2",
    "commit -b b.qcow2 e.qcow2",
    "commit -b ./a.qcow2 e.qcow2",
    "commit -r 50M -t none -b a.qcow2 e.qcow2",
    "commit -d -b a.qcow2 c.qcow2",
    "commit c.qcow2",
    "commit -d b.qcow2",
    f"commit --image-opts {ENCRYPTED}",
    f"commit --image-opts -b b.qcow2 {ENCRYPTED}",
]


@pytest.mark.parametrize("command", COMMITS)
def test_commit(command: str, twins: Twins) -> None:
    """Bases grow; where QEMU copies whole clusters of its own, we copy what there is."""
    top = command.rpartition(" ")[2]
    name = "d" if top == ENCRYPTED else top[0]
    before = twins.seen(twins.images, name, allocation=False)
    ours, theirs = twins.run(command)
    assert ours == theirs
    assert ours.code == 0
    twins.assert_equal(allocation=False)
    given = re.search(r"-b (?:\./)?(\w)", command)
    base = given[1] if given else LAYERS[LAYERS.index(name) - 1]
    content, _ = twins.seen(twins.ours, base, allocation=False)
    assert content[: len(before[0])] == before[0]


CONVERSIONS = [
    "convert -O qcow2 -B a.qcow2 -F qcow2 e.qcow2 out.qcow2",
    "convert -O qcow2 -B short.qcow2 -F qcow2 e.qcow2 out.qcow2",
    "convert -O qcow2 -B long.qcow2 -F qcow2 e.qcow2 out.qcow2",
    "convert -c -O qcow2 -B a.qcow2 -F qcow2 c.qcow2 out.qcow2",
    "convert --salvage -O qcow2 -B b.qcow2 -F qcow2 c.qcow2 out.qcow2",
    "convert -C -O qcow2 e.qcow2 out.qcow2",
    "convert -W -m 16 -O qcow2 e.qcow2 out.qcow2",
    "convert -U -T none -t none -O qcow2 e.qcow2 out.qcow2",
    "convert -S 0 -O qcow2 b.qcow2 out.qcow2",
    "convert -S 64k -O qcow2 e.qcow2 out.qcow2",
    "convert -S 2k -O qcow2 -o extended_l2=on e.qcow2 out.qcow2",
    "convert -O qcow2 a.qcow2 e.qcow2 short.qcow2 b.qcow2 out.qcow2",
    "convert -c -O qcow2 a.qcow2 c.qcow2 out.qcow2",
    "convert -n -O qcow2 e.qcow2 long.qcow2",
    "convert -n --target-is-zero -O qcow2 e.qcow2 blank.qcow2",
    "convert -n -W -m 1 -O qcow2 a.qcow2 e.qcow2",
    "convert -n -O qcow2 a.qcow2 c.qcow2",
    "convert -l snap -O qcow2 a.qcow2 out.qcow2",
    "convert -l snapshot.id=1 -O qcow2 -B short.qcow2 -F qcow2 a.qcow2 out.qcow2",
    "convert --bitmaps -O qcow2 a.qcow2 out.qcow2",
    "convert --bitmaps -c --salvage -O qcow2 a.qcow2 out.qcow2",
    "convert --bitmaps -O qcow2 -B short.qcow2 -F qcow2 a.qcow2 out.qcow2",
    f"convert --image-opts -O qcow2 {ENCRYPTED} out.qcow2",
    "convert --image-opts -n --target-image-opts "
    f"driver=qcow2,file.filename=c.qcow2 {ENCRYPTED}",
    "convert --target-image-opts -n --target-is-zero -W e.qcow2 "
    "driver=qcow2,file.filename=blank.qcow2",
]


@pytest.mark.parametrize("command", CONVERSIONS)
def test_convert(command: str, twins: Twins) -> None:
    ours, theirs = twins.run(command)
    assert ours == theirs == Outcome(0, "", "")
    twins.assert_equal()
    if "--bitmaps" in command:
        ours, theirs = (
            json.loads(one.stdout) for one in twins.run("info --output=json out.qcow2")
        )
        bitmaps = ours["format-specific"]["data"]["bitmaps"]
        assert [bitmap["name"] for bitmap in bitmaps] == ["b0", "b1"]
        assert bitmaps == theirs["format-specific"]["data"]["bitmaps"]


REFUSED = [
    "rebase -B long.qcow2 -F qcow2 e.qcow2",
    "rebase -b e.qcow2 -F qcow2 e.qcow2",
    "rebase -b e.qcow2 -F qcow2 b.qcow2",
    f"rebase --image-opts -b b.qcow2 -F qcow2 {ENCRYPTED}",
    "commit -b short.qcow2 e.qcow2",
    "commit -b d.qcow2 e.qcow2",
    "convert -n -O qcow2 e.qcow2 short.qcow2",
    "convert -n -O qcow2 e.qcow2 c.qcow2",
    "convert -l snap -O qcow2 a.qcow2 a.qcow2 out.qcow2",
    "convert -l snap -O qcow2 b.qcow2 out.qcow2",
    "convert -n -S 0 -C --target-image-opts e.qcow2 driver=qcow2,file.filename=long.qcow2",
    "compare -s c.qcow2 b.qcow2",
    "compare -s a.qcow2 b.qcow2",
    "compare -q -s e.qcow2 c.qcow2",
]


@pytest.mark.parametrize("command", REFUSED)
def test_the_same_words(command: str, twins: Twins) -> None:
    ours, theirs = twins.run(command)
    # The keys of an object are in no order.
    assert re.sub(r"json:\{.*\}", "json:{}", ours.stderr) == re.sub(
        r"json:\{.*\}", "json:{}", theirs.stderr
    )
    assert (ours.code, ours.stdout) == (theirs.code, theirs.stdout)
    assert ours.code == 1
    assert {path.name for path in twins.ours.iterdir()} == {
        path.name for path in twins.theirs.iterdir()
    }
    if not command.startswith("commit"):
        assert twins.changed() == []
