"""``lamina-nbd``: serve a disk over NBD, or list what another server has. Drop-in for ``qemu-nbd``.

``command.py`` reads the command line, ``serving.py`` opens the image and serves it, ``listing.py``
asks other servers, ``daemon.py`` is the process itself, ``device.py`` the kernel's client.
"""

from __future__ import annotations

import sys

from lamina.tools.tool import Tool


def main() -> int:
    from lamina.tools.nbd.command import run

    return Tool(sys.argv[0]).run(run, sys.argv[1:])
