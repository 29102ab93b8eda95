"""``Image.bitmaps``: what was written to a disk since somebody last asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lamina.block import registry
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.driver import Driver
    from lamina.block.node import Node


class Bitmap:
    """A dirty bitmap of an open image; one bit stands for ``granularity`` bytes.

    All methods raise ``LaminaError``; an ``inconsistent`` bitmap can only be removed.
    """

    def __init__(self, node: Node, dirty: DirtyBitmap) -> None:
        self._node = node
        self._dirty = dirty

    @property
    def _driver(self) -> Driver:
        return registry.driver(self._node.driver)

    @property
    def name(self) -> str:
        return self._dirty.name

    @property
    def granularity(self) -> int:
        """Bytes."""
        return self._dirty.granularity

    @property
    def inconsistent(self) -> bool:
        """Whoever wrote to the image last did not store it."""
        return self._dirty.inconsistent

    @property
    def enabled(self) -> bool:
        """It records what is written; can be set."""
        return self._dirty.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._driver.enable_bitmap(self._node, self.name, enabled)

    @property
    def dirty_bytes(self) -> int:
        """How much is dirty, in whole granules."""
        self._dirty.check_usable()
        return self._dirty.dirty_bytes

    def ranges(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of what is dirty, in order and without neighbours."""
        self._dirty.check_usable()
        return self._dirty.ranges(offset, length)

    def clear(self) -> None:
        """Make the whole disk clean."""
        self._driver.clear_bitmap(self._node, self.name)

    def merge(self, other: Bitmap) -> None:
        """Make dirty what is dirty in ``other``, which may be one of another image of this size."""
        self._driver.merge_bitmap(self._node, self.name, other._node, other.name)

    def __repr__(self) -> str:
        return f"<Bitmap {self.name!r} of {self._node.filename!r}>"


class Bitmaps(Mapping[str, Bitmap]):
    """The bitmaps that an image keeps, by name. They are stored when the image is closed.

    >>> import lamina
    >>> lamina.create("b.qcow2", "qcow2", "1M")
    >>> with lamina.open("b.qcow2", writable=True) as image:
    ...     since_monday = image.bitmaps.add("monday")
    ...     image.pwrite(b"new", 100_000)
    ...     list(since_monday.ranges())
    [(65536, 65536)]
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getitem__(self, name: str) -> Bitmap:
        for dirty in self._node.dirty_bitmaps:
            if dirty.persistent and dirty.name == name:
                return Bitmap(self._node, dirty)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([one.name for one in self._node.dirty_bitmaps if one.persistent])

    def __len__(self) -> int:
        return sum(one.persistent for one in self._node.dirty_bitmaps)

    def add(self, name: str, granularity: int | None = None) -> Bitmap:
        """A new bitmap, which records from now on.

        ``granularity``: bytes, a power of two from 512 on; None: what suits the image. Raises
        ImageUnsupported where the format keeps none.
        """
        registry.driver(self._node.driver).add_bitmap(self._node, name, granularity)
        return self[name]

    def remove(self, name: str) -> None:
        """Forget a bitmap, at once."""
        registry.driver(self._node.driver).remove_bitmap(self._node, name)

    def store(self) -> None:
        """Bring all bitmaps to the file now: closing does, but cannot fail."""
        registry.driver(self._node.driver).store_bitmaps(self._node)
