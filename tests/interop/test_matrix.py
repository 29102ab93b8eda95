"""Any format to any other: a disk with a file system goes from each kind of image to each.

QEMU makes the sources and judges what comes out: the content is that of the disk, and the image is
sound where the format can be checked.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from lamina.tools import img
from lamina.tools.tool import Tool
from tests.unit.dmg.images import RAW
from tests.unit.dmg.images import pack as pack_dmg
from tests.unit.test_bochs import redolog
from tests.unit.test_cloop import pack as pack_cloop

pytestmark = pytest.mark.peer

SECRET = "secret,id=key,data=0123456"
SIZE = 9 << 20
"""Bytes: no multiple of the blocks of most formats."""


class Kind(NamedTuple):
    """Of image: what it is called here, its format, and the options it is made with."""

    name: str
    format: str
    options: str = ""
    compressed: bool = False
    checked: bool = True
    """QEMU can check it."""

    @property
    def is_encrypted(self) -> bool:
        return "key-secret" in self.options

    def creation(self) -> list[str]:
        words = ["-O", self.format]
        if self.options:
            words += ["-o", self.options]
        return [*words, "-c"] if self.compressed else words

    def image(self, filename: str) -> str:
        """The words of ``--image-opts`` for a file of this kind."""
        opened = f"driver={self.format},file.filename={filename}"
        if self.format == "luks":
            opened += ",key-secret=key"
        elif self.is_encrypted:
            opened += ",encrypt.key-secret=key"
        return opened


LUKS_QCOW2 = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
KINDS = [
    Kind("raw", "raw", checked=False),
    Kind("qcow2", "qcow2"),
    Kind("qcow2-v2", "qcow2", "compat=0.10,cluster_size=4k"),
    Kind("qcow2-zlib", "qcow2", compressed=True),
    Kind("qcow2-zstd", "qcow2", "compression_type=zstd", compressed=True),
    Kind("qcow2-subclusters", "qcow2", "extended_l2=on,cluster_size=128k"),
    Kind("qcow2-luks", "qcow2", LUKS_QCOW2),
    Kind("qcow", "qcow", checked=False),
    Kind("qcow-compressed", "qcow", compressed=True, checked=False),
    Kind("qed", "qed"),
    Kind("luks", "luks", "key-secret=key,iter-time=10", checked=False),
    Kind("vdi", "vdi"),
    Kind("vdi-static", "vdi", "static=on"),
    Kind("vmdk", "vmdk"),
    Kind("vmdk-zeroes", "vmdk", "zeroed_grain=on,compat6=on,adapter_type=lsilogic"),
    Kind("vmdk-flat", "vmdk", "subformat=monolithicFlat", checked=False),
    Kind("vmdk-split", "vmdk", "subformat=twoGbMaxExtentSparse"),
    Kind("vmdk-split-flat", "vmdk", "subformat=twoGbMaxExtentFlat", checked=False),
    Kind("vmdk-stream", "vmdk", "subformat=streamOptimized"),
    Kind("vpc", "vpc", "force_size=on", checked=False),
    Kind("vpc-chs", "vpc", checked=False),
    Kind("vpc-fixed", "vpc", "subformat=fixed,force_size=on", checked=False),
    Kind("vhdx", "vhdx"),
    Kind("vhdx-fixed", "vhdx", "subformat=fixed"),
    Kind("parallels", "parallels"),
]


def qemu_img(*words: str) -> None:
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 file system with this test in it."""
    folder = tmp_path_factory.mktemp("matrix")
    files = folder / "files"
    files.mkdir()
    for path in Path(__file__).parent.glob("*.py"):
        (files / path.name).write_bytes(path.read_bytes())
    path = folder / "disk"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(SIZE)
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", files, path]
    subprocess.run(command, check=True)
    return path


READ_ONLY = {
    "bochs": lambda content: redolog(content, 65536),
    "cloop": lambda content: pack_cloop(content, 1 << 19),
    "dmg": lambda content: pack_dmg(content, (0x80000005, 0x80000006, 0x80000004, RAW), chunk=512),
}
"""What QEMU and we only read, and what makes it of the content of a disk."""


@pytest.mark.parametrize("source", READ_ONLY)
def test_from_what_is_only_read(source: str, disk: Path, tmp_path: Path) -> None:
    image, target = tmp_path / f"source.{source}", tmp_path / "target"
    image.write_bytes(READ_ONLY[source](disk.read_bytes()))
    for kind in ("raw", "qcow2", "vmdk", "vhdx"):
        words = ["convert", "-f", source, "-O", kind, str(image), str(target)]
        assert Tool("lamina-img").run(img.run, words) == 0
        qemu_img("compare", "-f", "raw", "-F", kind, str(disk), str(target))


@pytest.mark.parametrize("source", KINDS, ids=lambda kind: kind.name)
def test_from_one_to_all(
    source: Kind, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image, plain = source.image("source"), f"driver=raw,file.filename={disk}"
    words = ["convert", "--object", SECRET, "-f", "raw", *source.creation(), str(disk), "source"]
    # Compressed images in qcow version 1 come out whole, but QEMU ends with an error.
    subprocess.run(["qemu-img", *words], check=(source.format, source.compressed) != ("qcow", True))
    qemu_img("compare", "--object", SECRET, "--image-opts", plain, image)
    for target in KINDS:
        words = ["convert", "--object", SECRET, "--image-opts", *target.creation(), image, "target"]
        assert Tool("lamina-img").run(img.run, words) == 0, target.name
        made = target.image("target")
        qemu_img("compare", "--object", SECRET, "--image-opts", plain, made)
        if target.checked:
            qemu_img("check", "-q", "--object", SECRET, "--image-opts", made)
        for path in tmp_path.glob("target*"):
            path.unlink()
