"""Our server under load: many clients at once, and fio.

``LAMINA_NBD_SECONDS=60 pytest -s tests/interop/test_nbd_load.py`` goes on for longer, and says how
much was done."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.interop.nbd_servers import (
    LIBNBD_PYTHON,
    assert_consistent,
    image,
    lamina_nbd,
    needs_nbdsh,
    run,
    url,
)

pytestmark = pytest.mark.peer

SECONDS = float(os.environ.get("LAMINA_NBD_SECONDS", "2"))
CLIENTS = 64
SIZE = 64 << 20
LOAD = Path(__file__).with_name("nbd_load.py")


def has_nbd_engine() -> bool:
    if shutil.which("fio") is None:
        return False
    return "nbd" in run("fio", "--enghelp").split()


@needs_nbdsh
@pytest.mark.timeout(300 + 2 * SECONDS)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_many_clients(tmp_path: Path, format: str) -> None:
    disk, content = image(tmp_path, format, size=SIZE), tmp_path / "content"
    socket = tmp_path / "socket"
    began = time.monotonic()
    with lamina_nbd(socket, "-e", CLIENTS + 1, "-f", format, "--discard=unmap", disk) as server:
        done = subprocess.run(
            [LIBNBD_PYTHON, LOAD, url(socket), str(CLIENTS), str(SECONDS), "1", content],
            capture_output=True,
            text=True,
            timeout=120 + 2 * SECONDS,
        )
        assert done.returncode == 0, done.stderr
        status = Path(f"/proc/{server.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"{format}: {done.stdout.strip()} requests, {time.monotonic() - began:.1f} s, {peak}")
    run("qemu-img", "compare", "-f", "raw", "-F", format, content, disk)
    if format == "qcow2":
        assert_consistent(disk, leaks=False)


@pytest.mark.skipif(not has_nbd_engine(), reason="needs fio with its engine for NBD")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fio(tmp_path: Path, format: str) -> None:
    """Random writes and reads, deep in flight, and all that it wrote verified by its sums."""
    disk, socket = image(tmp_path, format, size=SIZE), tmp_path / "socket"
    with lamina_nbd(socket, "-f", format, disk):
        found = run(
            "fio",
            "--name=test",
            "--ioengine=nbd",
            f"--uri={url(socket)}",
            "--rw=randrw",
            "--bsrange=512-64k",
            "--size=16m",
            "--io_size=8m",
            "--iodepth=32",
            "--fsync=100",
            "--randseed=1",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            f"--aux-path={tmp_path}",
        )
        assert "err= 0" in found
    if format == "qcow2":
        assert_consistent(disk, leaks=False)
