"""Options of the vdi driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass


@dataclass(frozen=True)
class VdiCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    static: bool = option(
        "static", Type.BOOL, False, "VDI static (pre-allocated) image", listed=True
    )
