"""One server, one client, one workload: ``python -m bench.nbd SERVER FORMAT IMAGE LOAD [TARGET]``.

SERVER is ``lamina-nbd``, ``qemu-nbd`` or ``nbdkit`` (raw images only). Loads: ``read-DEPTH`` and
``write-DEPTH`` are scattered requests of 4 KiB, ``sequential-read`` and ``sequential-write`` take
256 KiB at a time, all of them sent by ``qemu-img bench``; ``lamina-img`` and ``nbdcopy`` copy the
whole export to the file TARGET.
Says on standard error how many seconds the load took, and how many KiB of memory the server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
_RUN = re.compile(r"Run completed in ([0-9.]+) seconds")
_STEP = 1052672
"""Bytes from one request to the next: a megabyte and a block, so that the disk is covered."""


def server_command(server: str, format: str, image: str, socket: str) -> list[str]:
    if server == "nbdkit":
        return ["nbdkit", "-f", "-U", socket, "file", image]
    tool = str(BIN / server) if server.startswith("lamina") else server
    return [tool, "-t", "-e", "8", "-k", socket, "-f", format, image]


def load_command(load: str, socket: str, target: str) -> list[str]:
    url = f"nbd+unix:///?socket={socket}"
    if load == "lamina-img":
        return [str(BIN / load), "convert", "-f", "raw", "-O", "raw", url, target]
    if load == "nbdcopy":
        return [load, url, target]
    bench = ["qemu-img", "bench", "-f", "raw", "-q"]
    # Not zeroes: other rows make their images of this one.
    more = ["-w", "--pattern", "65"] if "write" in load else []
    if load.startswith("sequential"):
        return [*bench, *more, "-c", "4000", "-d", "8", "-s", "256k", url]
    _, depth = load.split("-")
    count = "20000" if depth == "1" else "60000"
    return [*bench, *more, "-c", count, "-d", depth, "-s", "4k", "-S", str(_STEP), url]


def main(server: str, format: str, image: str, load: str, target: str = "") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        socket = os.path.join(scratch, "socket")
        running = subprocess.Popen(server_command(server, format, image, socket))
        try:
            while not os.path.exists(socket):
                time.sleep(0.01)
            time.sleep(0.1)
            start = time.perf_counter()
            said = subprocess.run(
                load_command(load, socket, target), check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            seconds = time.perf_counter() - start
            if run := _RUN.search(said):
                seconds = float(run[1])  # without the flush at the end, which is the disk's work
        finally:
            running.terminate()
            _, _, usage = os.wait4(running.pid, 0)
    print(seconds, usage.ru_maxrss, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
