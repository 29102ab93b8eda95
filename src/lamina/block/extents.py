"""Where the bytes of a disk are: values that explain themselves, so nobody has to ask again."""

from __future__ import annotations

import enum

from lamina.hints import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.block.node import Node


class Kind(enum.IntEnum):
    DATA = 0
    """Plain bytes at ``node``:``host_offset``."""
    ZERO = 1
    """Reads as zeroes. ``host_offset`` >= 0: the space is reserved all the same."""
    BELOW = 2
    """Not here: ask the backing file; without one, zeroes. ``host_offset`` >= 0: space is reserved
    all the same."""
    ENCODED = 3
    """A compressed unit at ``node``:``host_offset``, ``stored_length`` bytes long."""
    INLINE = 4
    """Bytes made up on the spot: ``data``."""


class Cipher(Protocol):
    """Whole batches of 512-byte sectors. ``sector`` numbers the first one (the tweak)."""

    def decrypt(self, buffer: memoryview, sector: int) -> None: ...
    def encrypt(self, buffer: memoryview, sector: int) -> None: ...


class Extent(NamedTuple):
    """A run of guest bytes that share one fate. All figures in bytes."""

    guest_offset: int
    length: int
    kind: Kind
    node: Node | None = None
    """Where ``host_offset`` points into, for DATA, ENCODED and reserved ZERO or BELOW. BELOW with
    no host offset: set by who cannot tell what is read there."""
    host_offset: int = -1
    stored_length: int = 0
    """ENCODED: bytes at ``host_offset`` that hold the encoded unit (an upper bound will do). ZERO:
    not 0 where zeroes are stored as any data are."""
    codec: str = ""
    """ENCODED: a name in ``lamina.codecs``."""
    unit_offset: int = 0
    """ENCODED: guest offset of the first byte that the unit decodes to."""
    unit_length: int = 0
    """ENCODED: bytes that the unit decodes to."""
    data: memoryview | None = None
    """INLINE: exactly ``length`` bytes."""
    cipher: Cipher | None = None
    """DATA: what to decrypt with."""
    first_sector: int = 0
    """DATA with a cipher: the tweak of the sector at ``guest_offset``."""

    @property
    def end(self) -> int:
        """Guest offset of the first byte behind."""
        return self.guest_offset + self.length

    def cut(self, start: int, end: int) -> Extent:
        """The part between the guest offsets ``start`` and ``end``, which must lie inside."""
        skip = start - self.guest_offset
        return self._replace(
            guest_offset=start,
            length=end - start,
            host_offset=(
                self.host_offset
                if self.host_offset < 0 or self.kind == Kind.ENCODED
                else self.host_offset + skip
            ),
            data=None if self.data is None else self.data[skip : skip + end - start],
            first_sector=self.first_sector + skip // 512 if self.cipher else 0,
        )


class Columns(NamedTuple):
    """Extents of a whole image as numpy arrays: never one Python object per cluster.

    ``nodes[node[i]]`` is the node of row i; ``host_offset`` is -1 where there is none. Rows are in
    guest order, adjoin each other and are coalesced. Codec and unit of ENCODED rows are those of
    the format (one row per unit).
    """

    guest_offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]
    host_offset: npt.NDArray[np.int64]
    stored_length: npt.NDArray[np.int64]
    node: npt.NDArray[np.uint8]
    nodes: tuple[Node | None, ...]

    @classmethod
    def from_extents(cls, extents: list[Extent]) -> Columns:
        import numpy as np

        nodes: list[Node | None] = []
        for extent in extents:
            if not any(extent.node is known for known in nodes):
                nodes.append(extent.node)
        index = {id(node): number for number, node in enumerate(nodes)}

        def column(name: str, dtype: Any) -> npt.NDArray[Any]:
            return np.array([getattr(extent, name) for extent in extents], dtype=dtype)

        return cls(
            column("guest_offset", np.int64),
            column("length", np.int64),
            column("kind", np.uint8),
            column("host_offset", np.int64),
            column("stored_length", np.int64),
            np.array([index[id(extent.node)] for extent in extents], dtype=np.uint8),
            tuple(nodes),
        )
