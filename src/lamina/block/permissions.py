"""What the users of a node do with it, and what they let others do.

The graph adds up the permissions of a node's users and passes them on to its children; the file
protocol turns the sums into QEMU's lock bytes, so the bits are numbered as those bytes are.
"""

from __future__ import annotations

import enum


class Perm(enum.IntFlag):
    NONE = 0
    CONSISTENT_READ = 1
    """What is read is a meaningful disk, not an intermediate state."""
    WRITE = 2
    WRITE_UNCHANGED = 4
    """Writes that leave visible content as it is."""
    RESIZE = 8
    ALL = 15


NAMES = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}
"""As QEMU spells them in lock errors, in bit order."""


def spell(perm: Perm) -> str:
    """``"write, resize"``, for messages."""
    return ", ".join(name for bit, name in NAMES.items() if perm & bit)
