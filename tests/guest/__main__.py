"""Linux under QEMU on disks that ours serves: ``python -m tests.guest [DIR]``.

The guest boots from ``nbd+unix://``, checks the sums of the files there, writes more, syncs and
powers off; booted again it checks these too. What builds and runs it lives beside this checkout, in
``../shared/components``; without that folder this says so and does nothing. The guest is built in
DIR (``.peers/guest``; a path of at most 80 bytes), where the next run finds it. A run takes about a
minute and is no part of ``./test``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.interop.nbd_servers import BIN, assert_consistent, lamina_nbd, run

ROOT = Path(__file__).resolve().parents[2]
COMPONENT = ROOT.parent / "shared" / "components" / "guest-check"
BUILT = ROOT / ".peers" / "guest"
SECONDS = 300
"""That one guest may take: it is emulated."""


class Guest:
    """In ``built``; its disk is an export of ours on ``socket``."""

    def __init__(self, built: Path, socket: Path) -> None:
        self._built = built
        self._drive = (
            f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},"
            "file.export=disk,file.reconnect-delay=60,if=virtio,discard=unmap"
        )

    def start(self, verb: str, *, read_only: bool = False) -> subprocess.Popen[str]:
        words = [COMPONENT, verb, self._built, "--timeout", str(SECONDS)]
        drive = self._drive + (",read-only=on" if read_only else "")
        return subprocess.Popen(
            [*words, "--", "-drive", drive],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, verb: str, *, read_only: bool = False) -> str:
        return self.end(self.start(verb, read_only=read_only))

    def end(self, running: subprocess.Popen[str]) -> str:
        output = running.communicate(timeout=SECONDS + 60)[0]
        assert running.returncode == 0, output
        assert "FAILED" not in output, output
        return output


def boots_of(output: str) -> set[int]:
    """The boots whose files the guest found as they were written."""
    return {
        int(line.split("-")[0].removeprefix("boot"))
        for line in output.splitlines()
        if line.startswith("boot") and line.endswith(": OK")
    }


def boots_from_qcow2(guest: Guest, boot: Path, work: Path, socket: Path) -> None:
    """Three times, the last by a new server."""
    disk = work / "boot.qcow2"
    run(BIN / "lamina-img", "convert", "-f", "raw", "-O", "qcow2", boot, disk)
    with lamina_nbd(socket, "-f", "qcow2", "--discard=unmap", disk):
        assert boots_of(guest.run("boot")) == {1}
        assert boots_of(guest.run("boot")) == {1, 2}
    assert_consistent(disk, leaks=False)
    with lamina_nbd(socket, "-f", "qcow2", "--discard=unmap", disk):
        assert boots_of(guest.run("boot")) == {1, 2, 3}
    assert_consistent(disk, leaks=False)


def outlives_its_server(guest: Guest, boot: Path, work: Path, socket: Path) -> None:
    """It is killed while the guest boots from it; the next one goes on. The image is raw: what was
    not flushed survives the process in the host's cache."""
    disk = work / "boot.raw"
    run("cp", "--sparse=always", boot, disk)
    with lamina_nbd(socket, "-f", "raw", disk) as server:
        running = guest.start("boot")
        time.sleep(5)
        assert running.poll() is None, guest.end(running)
        server.kill()
        server.wait()
    with lamina_nbd(socket, "-f", "raw", disk):
        assert boots_of(guest.end(running)) == {1}
        assert boots_of(guest.run("boot")) == {1, 2}


def makes_a_file_system(guest: Guest, boot: Path, work: Path, socket: Path) -> None:
    """With deleted files that it trims."""
    disk = work / "data.qcow2"
    run(BIN / "lamina-img", "create", "-q", "-f", "qcow2", disk, "64M")
    with lamina_nbd(socket, "-f", "qcow2", "--discard=unmap", disk):
        output = guest.run("write")
        assert "no trim" not in output, output
    assert_consistent(disk, leaks=False)
    with lamina_nbd(socket, "-r", "-f", "qcow2", disk):
        guest.run("verify", read_only=True)


STEPS: list[Callable[[Guest, Path, Path, Path], None]] = [
    boots_from_qcow2,
    outlives_its_server,
    makes_a_file_system,
]


def main(built: Path) -> int:
    if not COMPONENT.exists():
        print(f"tests.guest: {COMPONENT} is not there: nothing is run")
        return 0
    subprocess.run([COMPONENT, "start", built], check=True, stdout=subprocess.DEVNULL)
    for step in STEPS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="guest-") as folder:
            work = Path(folder)
            socket = work / "socket"
            step(Guest(built, socket), built / "boot.raw", work, socket)
        print(f"{step.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILT))
