"""The opening policy: one gate for every name that an image stores.

A disk image may name other files: a backing file, a data file, the extents of a VMDK. Whoever opens
an image that somebody else made must be able to say that it may not reach for ``/etc/shadow`` or
for a server in the internal network.
"""

from __future__ import annotations

import enum
import os

from lamina.errors import Refused


class Policy(enum.Enum):
    """What names stored in images may be opened."""

    ALLOW = "allow"
    """All of them, as QEMU does."""
    BESIDE = "beside"
    """Plain local files in the directory of the image that names them, or below it."""
    DENY = "deny"
    """None."""


def check_named(
    policy: Policy, name: str, role: str, path: str | None, image: str | None
) -> None:
    """Raises Refused unless ``policy`` lets an image open what it names as its ``role``.

    ``path`` is the local file that the name resolved to, None for everything else; ``image`` the
    path of the image itself. Symbolic links are followed before judging.
    """
    if policy is Policy.ALLOW:
        return
    if policy is Policy.DENY:
        raise Refused(f"Opening the {role} file '{name}' is denied by the opening policy")
    if path is None or image is None:
        raise Refused(f"The {role} file '{name}' is not a plain local file")
    home = os.path.dirname(os.path.realpath(image))
    target = os.path.realpath(path)
    if not target.startswith(home.rstrip(os.sep) + os.sep):
        raise Refused(f"The {role} file '{name}' is not in the directory of the image")
    if os.path.exists(target) and not os.path.isfile(target):
        raise Refused(f"The {role} file '{name}' is not a plain local file")


def check_format(driver: str, name: str, role: str) -> None:
    """Raises Refused for a stored driver that is no format: it might read the name its own way."""
    from lamina.block import registry

    if not registry.driver(driver).is_format:
        raise Refused(f"The driver '{driver}' of the {role} file '{name}' is no image format")
