from __future__ import annotations

import doctest
import io
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
import lamina.bitmaps
import lamina.image


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", [lamina, lamina.image, lamina.bitmaps])
def test_the_examples_are_true(module: object) -> None:
    failed, attempted = doctest.testmod(module)  # type: ignore[arg-type]
    assert attempted > 0
    assert failed == 0


def test_importing_it_imports_next_to_nothing() -> None:
    code = "import sys, lamina; print(*(m for m in sys.modules if m.startswith('lamina')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lamina"]


@pytest.mark.parametrize("name", lamina.__all__)
def test_everything_promised_is_there(name: str) -> None:
    assert getattr(lamina, name).__name__ == name


def test_data() -> None:
    lamina.create("d", "raw", "64k")
    with lamina.open(Path("d"), format="raw", writable=True) as image:
        assert (image.size, image.format, image.filename, image.writable) == (
            65536, "raw", "d", True,
        )
        image.pwrite(b"one", 1)
        buffer = bytearray(5)
        image.readinto(buffer, 0)
        assert buffer == b"\0one\0"
        image.write_zeroes(2, 2)
        assert image.pread(5, 0) == b"\0o\0\0\0"
        image.discard(4096, 0)
        image.flush()
        image.resize(1 << 20)
        assert image.size == 1 << 20
        with pytest.raises(lamina.UsageError, match="Invalid preallocation mode 'x'"):
            image.resize(1, preallocation="x")
        with pytest.raises(lamina.StorageError):
            image.pread(1, 1 << 20)
    image.close()


def test_reading_only() -> None:
    lamina.create("d", "raw", 512)
    with lamina.open("d") as image:
        assert not image.writable
        with pytest.raises(lamina.Refused):
            image.pwrite(b"x", 0)
        assert not image.stream().writable()


def test_extents_are_coalesced_and_without_gaps() -> None:
    lamina.create("d", "raw", "1M")
    with lamina.open("d", format="raw", writable=True) as image:
        image.pwrite(b"x" * 65536, 1 << 18)
        regions = list(image.extents())
        assert sum(region.length for region in regions) == image.size
        assert [region.offset for region in regions] == [
            sum(region.length for region in regions[:number]) for number in range(len(regions))
        ]
        assert not any(
            region.zero for region in regions if region.offset <= 1 << 18 < sum(region[:2])
        )
        (part,) = image.extents(1 << 18, 4096)
        assert part == lamina.Region(1 << 18, 4096, present=True, zero=False, depth=0)


def test_as_a_stream() -> None:
    lamina.create("d", "raw", 4096)
    with lamina.open("d", format="raw", writable=True) as image:
        with image.stream() as stream:
            assert stream.seek(4090) == 4090
            assert stream.write(b"0123456789") == 6
            with pytest.raises(OSError, match="No space left"):
                stream.write(b"x")
            assert stream.write(b"") == 0
            assert stream.read() == b""
            assert stream.seek(-6, io.SEEK_CUR) == stream.tell() == 4090
            assert stream.read() == b"012345"
            assert stream.truncate(512) == 512
            with pytest.raises(ValueError, match="negative"):
                stream.seek(-1)
        assert io.BufferedReader(image.stream()).read() == bytes(512)
        assert image.size == 512


def test_inspecting_opens_nothing_else() -> None:
    lamina.create("base", "qcow", "1M")
    lamina.create("top", "qcow", backing_file="base", backing_format="qcow")
    Path("base").unlink()
    info = lamina.inspect("top")
    assert (info.format, info.virtual_size, info.backing_filename) == ("qcow", 1 << 20, "base")


def test_the_opening_policy() -> None:
    Path("sub").mkdir()
    lamina.create("base", "raw", "1M")
    lamina.create("sub/top", "qcow", backing_file="../base", backing_format="raw")
    for policy, opens in (("allow", True), ("beside", False), (lamina.Policy.DENY, False)):
        if opens:
            lamina.open("sub/top", policy=policy).close()
        else:
            with pytest.raises(lamina.Refused):
                lamina.open("sub/top", policy=policy)
    with pytest.raises(lamina.UsageError):
        lamina.open("sub/top", policy="perhaps")


def test_bitmaps() -> None:
    lamina.create("d", "qcow2", "1M")
    with lamina.open("d", format="qcow2", writable=True) as image:
        assert dict(image.bitmaps) == {}
        one = image.bitmaps.add("one", 512)
        two = image.bitmaps.add("two")
        two.enabled = False
        image.pwrite(b"x", 1000)
        two.merge(one)
        assert [(b.granularity, b.enabled, b.dirty_bytes) for b in (one, two)] == [
            (512, True, 512),
            (65536, False, 65536),
        ]
        image.bitmaps.store()
        one.clear()
        image.bitmaps.add("three")
        image.bitmaps.remove("two")
        with pytest.raises(KeyError):
            image.bitmaps["two"]
        with pytest.raises(lamina.UsageError, match="already exists"):
            image.bitmaps.add("one")
    with lamina.open("d", format="qcow2") as image:
        assert set(image.bitmaps) == {"one", "three"}
        assert len(image.bitmaps) == 2
        assert list(image.bitmaps["one"].ranges()) == []
        assert not image.bitmaps["one"].inconsistent
        with pytest.raises(lamina.Refused):
            image.bitmaps["one"].clear()
    lamina.create("r", "raw", "1M")
    with lamina.open("r", format="raw", writable=True) as image:
        assert not image.bitmaps
        with pytest.raises(lamina.ImageUnsupported, match="Can't store persistent bitmaps"):
            image.bitmaps.add("one")
