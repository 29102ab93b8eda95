"""The file protocol through the tools: what is created, shown and refused, as with QEMU's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img"),
    pytest.mark.skipif(sys.platform != "linux", reason="errors and holes of Linux"),
]

CALL = "import sys; from lamina.tools.{0} import main; sys.argv[0] = 'qemu-{0}'; sys.exit(main())"


def run(ours: bool, tool: str, *arguments: str) -> tuple[int, str, str]:
    program = [sys.executable, "-c", CALL.format(tool)] if ours else [f"qemu-{tool}"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def compare(tool: str, *arguments: str) -> tuple[int, str, str]:
    found = run(True, tool, *arguments)
    assert found == run(False, tool, *arguments)
    return found


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    with open("sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(65536)
        file.write(b"x" * 65536)
        file.seek(524288)
        file.write(b"x" * 4096)
    Path("odd").write_bytes(b"x" * 1000)


@pytest.mark.parametrize("size", ["0", "512", "1000", "1M", "3000k"])
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_new_files(mode: str, size: str) -> None:
    results = []
    for ours in (True, False):
        status, out, err = run(ours, "img", "create", "-f", "raw", "-o", f"preallocation={mode}",
                               "new", size)  # fmt: skip
        about = os.stat("new")
        results.append((status, out, err, about.st_size, about.st_blocks, about.st_mode))
        os.unlink("new")
    assert results[0] == results[1]
    assert results[0][0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere/new", "1M"],
        ["dir", "1M"],
        ["dir/", "1M"],
        ["-o", "preallocation=metadata", "new", "1M"],
        ["-o", "preallocation=magic", "new", "1M"],
        ["-o", "extent_size_hint=3", "new", "1M"],
        ["-o", "nocow=on", "new", "1M"],
        ["-o", "nocow=perhaps", "new", "1M"],
        ["-o", "preallocation=falloc", "new", "1E"],
        ["new", "9223372036854775807"],
        ["-o", "help", "new"],
        ["/dev/null", "0"],
        ["/dev/null", "1M"],
        ["-o", "help", "/dev/null"],
    ],
    ids=" ".join,
)
def test_creation_that_fails_or_tells(arguments: list[str]) -> None:
    compare("img", "create", "-f", "raw", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preallocation=metadata", "sparse", "2M"],
        ["--preallocation=full", "--shrink", "sparse", "512k"],
        ["--preallocation=falloc", "sparse", "2M"],
        ["sparse", "7E"],
        ["--shrink", "sparse", "512k"],
    ],
    ids=" ".join,
)
def test_resizing(arguments: list[str]) -> None:
    results = []
    for ours in (True, False):
        shutil.copyfile("odd", "copy")
        with open("copy", "r+b") as file:
            file.truncate(1 << 20)
        given = ["copy" if one == "sparse" else one for one in arguments]
        found = run(ours, "img", "resize", "-f", "raw", *given)
        about = os.stat("copy")
        results.append((*found, about.st_size, about.st_blocks))
    assert results[0] == results[1]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[str]:
    """A file system of one megabyte."""
    if os.geteuid():
        pytest.skip("needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path / "dir")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount")
    yield "dir"
    subprocess.run(["umount", str(tmp_path / "dir")], check=True)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_a_file_system_that_is_too_small(small: str, mode: str) -> None:
    option = f"preallocation={mode}"
    compare("img", "create", "-f", "raw", "-o", option, f"{small}/new", "2M")
    assert os.stat(f"{small}/new").st_size == 0
    compare("img", "create", "-f", "raw", f"{small}/new", "64k")
    compare("img", "resize", "-f", "raw", f"--preallocation={mode}", f"{small}/new", "2M")
    assert os.stat(f"{small}/new").st_size == 65536
    compare("img", "create", "-f", "raw", "-o", "extent_size_hint=1M", f"{small}/new", "64k")


@pytest.mark.parametrize("name", ["sparse", "odd"])
@pytest.mark.parametrize("options", ["", ",file.cache.direct=on"])
def test_where_the_data_is(name: str, options: str) -> None:
    given = f"driver=raw,file.driver=file,file.filename={name}{options}"
    compare("img", "map", "--output=json", "--image-opts", given)
    compare("img", "info", "--output=json", "--image-opts", given)


@pytest.mark.parametrize(
    "options",
    [
        "driver=file",
        "driver=file,filename=",
        "driver=file,filename=nope",
        "driver=file,filename=dir",
        "driver=file,filename=/dev/null",
        "driver=host_device,filename=odd",
        "driver=host_device,filename=nope",
        "driver=host_cdrom,filename=odd",
        "driver=file,filename=odd,aio=native",
        "driver=file,filename=odd,aio=magic",
        "driver=file,filename=odd,locking=perhaps",
        "driver=file,filename=odd,locking=off",
        "driver=file,filename=odd,pr-manager=pr0",
        "driver=file,filename=odd,drop-cache=off,aio=threads,aio-max-batch=4",
        "driver=file,filename=/proc/cpuinfo,cache.direct=on",
    ],
)
def test_options(options: str) -> None:
    compare("io", "-r", "-c", "length", "--image-opts", options)


@pytest.mark.parametrize("cache", ["writeback", "none", "directsync", "unsafe"])
def test_bytes_by_way_of_every_cache(cache: str) -> None:
    """What one writes the other reads, past the page cache and through it."""
    for ours in (True, False):
        with open("disk", "wb") as file:
            file.truncate(1 << 20)
        steps = [
            "write -P 1 0 64k",
            "write -P 2 100 5000",
            "write -z 8k 10000",
            "write -P 3 1023k 1k",
        ]
        written = run(ours, "io", "-t", cache, "-f", "raw", *_commands(steps), "disk")
        assert written[0] == 0
        checks = ["read -P 1 0 100", "read -P 2 100 5000", "read -P 1 5100 3092",
                  "read -P 0 8k 10000", "read -P 1 18192 47344", "read -P 0 64k 959k",
                  "read -P 3 1023k 1k"]  # fmt: skip
        found = run(not ours, "io", "-t", cache, "-f", "raw", *_commands(checks), "disk")
        assert found[0] == 0
        assert "failed" not in found[1]


def _commands(steps: list[str]) -> list[str]:
    return [part for step in steps for part in ("-c", step)]
