"""``lamina-io``: read, write and disturb disk images by hand or script. Drop-in for ``qemu-io``.

A module per group of commands, imported when one of them is called.
"""

from __future__ import annotations

import sys

from lamina.tools.tool import Tool


def main() -> int:
    from lamina.tools.io.start import run

    return Tool(sys.argv[0]).run(run, sys.argv[1:])
