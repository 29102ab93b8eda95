"""Options of the parallels driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass
from lamina.units import MIB


@dataclass(frozen=True)
class ParallelsOptions:
    prealloc_mode: str = option(
        "prealloc-mode",
        default="falloc",
        help="How space is set aside when the file grows: falloc (allocated) or truncate (only "
        "its length changed)",
    )
    prealloc_size: int = option(
        "prealloc-size",
        Type.SIZE,
        128 * MIB,
        "Space to be set aside when the file grows; given back when the image is closed",
    )


@dataclass(frozen=True)
class ParallelsCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    cluster_size: int = option(
        "cluster_size", Type.SIZE, MIB, "Parallels image cluster size", listed=True
    )
