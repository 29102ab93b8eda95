"""What a copy-on-read filter leaves in the image that is read through it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.extents import Kind
from lamina.block.session import Session
from lamina.errors import LaminaError, Refused, UsageError

K = 1024
SIZE = 1024 * K

Chain = tuple[Path, Path, Path]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """base holds 5s up to 256 KiB, middle 6s from 512 to 576 KiB, top nothing; 64 KiB clusters."""
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    create_image(str(base), "qcow2", session=Session(), size=SIZE)
    write(base, 0, b"\5" * 256 * K)
    create_image(
        str(middle), "qcow2", session=Session(), backing_file=str(base), backing_format="qcow2"
    )
    write(middle, 512 * K, b"\6" * 64 * K)
    create_image(
        str(top), "qcow2", session=Session(), backing_file=str(middle), backing_format="qcow2"
    )
    return base, middle, top


def write(path: Path, offset: int, data: bytes) -> None:
    with Backend.open(str(path), session=Session(), writable=True) as image:
        image.write(offset, data)


def held(path: Path) -> list[tuple[int, int, Kind]]:
    """(start, length, kind) in KiB of what an image holds itself."""
    with Backend.open(str(path), session=Session()) as image:
        return [
            (one.guest_offset // K, one.length // K, one.kind)
            for one in image.extents(0, image.size)
            if one.kind is not Kind.BELOW
        ]


def copying(top: Path, **options: str) -> Backend:
    """The filter, opened by its name and with its options."""
    given = {
        "driver": "copy-on-read",
        "file.driver": "qcow2",
        "file.file.driver": "file",
        "file.file.filename": str(top),
        **{key.replace("__", ".").replace("_", "-"): value for key, value in options.items()},
    }
    return Backend.open(given, session=Session(), writable=True)


def test_whole_units_are_copied(chain: Chain) -> None:
    with copying(chain[2]) as disk:
        assert disk.read(60 * K, 8 * K) == b"\5" * 8 * K
        assert disk.read(600 * K, 1) == b"\0"
    assert held(chain[2]) == [(0, 128, Kind.DATA), (576, 64, Kind.ZERO)]


def test_what_was_copied_outlives_its_source(chain: Chain) -> None:
    with copying(chain[2]) as disk:
        before = disk.read(0, SIZE)
    given = {"driver": "qcow2", "file.filename": str(chain[2]), "backing": None}
    with Backend.open(given, session=Session()) as alone:
        assert alone.read(0, SIZE) == before


def test_only_what_is_missing_is_copied(chain: Chain) -> None:
    write(chain[2], 64 * K, b"\7" * 64 * K)
    with copying(chain[2]) as disk:
        assert disk.read(0, 192 * K) == b"\5" * 64 * K + b"\7" * 64 * K + b"\5" * 64 * K


def test_reading_nothing_copies_nothing(chain: Chain) -> None:
    with copying(chain[2]) as disk:
        assert disk.read(0, 0) == b""
    assert held(chain[2]) == []


def test_the_last_unit_may_be_a_part_of_one(tmp_path: Path) -> None:
    path = tmp_path / "small.qcow2"
    create_image(str(path), "qcow2", session=Session(), size=K)
    with copying(path) as disk:
        assert disk.read(0, K) == bytes(K)
    assert held(path) == [(0, 1, Kind.ZERO)]


def test_nothing_below_bottom_is_copied(chain: Chain) -> None:
    with copying(chain[2], file__backing__node_name="m", bottom="m") as disk:
        assert disk.read(0, SIZE).startswith(b"\5")
    assert held(chain[2]) == [(512, 64, Kind.DATA)]


def test_the_image_itself_as_bottom(chain: Chain) -> None:
    with copying(chain[2], file__node_name="t", bottom="t") as disk:
        disk.read(0, SIZE)
    assert held(chain[2]) == []


def test_bottom_is_a_layer_of_the_chain(chain: Chain) -> None:
    with pytest.raises(UsageError, match=r"^Bottom node 'nope' not found$"):
        copying(chain[2], bottom="nope")
    write(chain[2], 0, b"free again")


def test_reading_only_is_refused(chain: Chain) -> None:
    given = {"driver": "copy-on-read", "file.driver": "qcow2"}
    given["file.file.filename"] = str(chain[2])
    with pytest.raises(Refused, match=r"^Block node is read-only$"):
        Backend.open(given, session=Session())
    with pytest.raises(UsageError, match=r"^Can't use copy-on-read on read-only device$"):
        Backend.open(str(chain[2]), session=Session(), copy_on_read=True)


def test_a_switch_puts_it_on_top_of_any_image(chain: Chain) -> None:
    with Backend.open(
        str(chain[2]), session=Session(), writable=True, copy_on_read=True
    ) as disk:
        assert disk.read(K, K) == b"\5" * K
        disk.write(64 * K, b"x")
    assert held(chain[2]) == [(0, 128, Kind.DATA)]


def test_a_write_that_cannot_be_made_fails_the_read(chain: Chain) -> None:
    options = {
        "driver": "copy-on-read",
        "file.driver": "blkdebug",
        "file.image.driver": "qcow2",
        "file.image.file.filename": str(chain[2]),
        "file.inject-error.0.event": "cor_write",
    }
    disk = Backend.open(options, session=Session(), writable=True)
    with disk, pytest.raises(LaminaError):
        disk.read(0, K)
    assert held(chain[2]) == []


def test_copies_never_undo_writes(chain: Chain) -> None:
    """Readers copy clusters up while a writer fills the very same clusters."""
    with copying(chain[2]) as disk:
        start = threading.Barrier(3)

        def read() -> None:
            start.wait()
            for offset in range(0, SIZE, 4 * K):
                disk.read(offset, 4 * K)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for one in readers:
            one.start()
        start.wait()
        for offset in range(0, SIZE, 4 * K):
            disk.write(offset, b"w" * 4 * K)
        for one in readers:
            one.join()
        assert disk.read(0, SIZE) == b"w" * SIZE


@pytest.mark.peer
@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
@pytest.mark.parametrize("command", ["read 60k 8k", "read 0 1M", "read 600k 1", "read 250k 300k"])
def test_the_same_is_copied_as_by_qemu(chain: Chain, command: str) -> None:
    def after(tool: list[str]) -> list[str]:
        copy = chain[2].with_name("copy.qcow2")
        shutil.copy(chain[2], copy)
        subprocess.run([*tool, "-C", "-c", command, copy], check=True, capture_output=True)
        shown = subprocess.run(
            ["qemu-io", "-r", "-c", "map", copy], check=True, capture_output=True, text=True
        )
        return shown.stdout.splitlines()

    from sys import executable

    ours = [executable, "-c", "import sys; from lamina.tools.io import main; sys.exit(main())"]
    assert after(ours) == after(["qemu-io"])
