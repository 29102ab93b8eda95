"""Copying the bitmaps of one image to another."""

from __future__ import annotations

import errno
from collections.abc import Callable

from lamina.block import registry
from lamina.errors import ImageCorrupt, LaminaError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.node import Node


def check_copyable(source: Node, *, skip_broken: bool) -> None:
    """Raises ImageCorrupt if there is a bitmap that cannot be copied, and may not be left out."""
    for bitmap in _persistent(source):
        if bitmap.inconsistent and not skip_broken:
            raise ImageCorrupt(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                structure="dirty bitmap",
                errno=errno.EINVAL,
                hint="Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            )


def copy_bitmaps(source: Node, target: Node, *, warn: Callable[[str], None]) -> None:
    """Give ``target``, a disk of the same size, the persistent bitmaps of ``source``.

    Inconsistent ones are left out with a warning. They are in the file once ``target`` is closed,
    or its driver was asked to store them.
    """
    driver = registry.driver(target.driver)
    # Those that are made last are stored first.
    for bitmap in reversed(_persistent(source)):
        name = bitmap.name
        if bitmap.inconsistent:
            warn(f"Skipping inconsistent bitmap '{name}'")
            continue
        try:
            driver.add_bitmap(target, name, bitmap.granularity)
        except LaminaError as error:
            raise error.in_context(f"Failed to create bitmap {name}: ") from None
        try:
            driver.merge_bitmap(target, name, source, name)
            driver.enable_bitmap(target, name, bitmap.enabled)
        except LaminaError as error:
            driver.remove_bitmap(target, name)
            raise error.in_context(f"Failed to populate bitmap {name}: ") from None


def _persistent(node: Node) -> list[DirtyBitmap]:
    return [bitmap for bitmap in node.dirty_bitmaps if bitmap.persistent]
