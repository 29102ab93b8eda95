"""Options of the vmdk driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass

SUBFORMATS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)
ADAPTERS = ("ide", "buslogic", "lsilogic", "legacyESX")


@dataclass(frozen=True)
class VmdkCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    adapter_type: str | None = option(
        "adapter_type",
        help="Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    )
    backing_file: str | None = option("backing_file", help="File name of a base image")
    backing_fmt: str | None = option("backing_fmt", help="Must be 'vmdk' if present")
    compat6: bool = option("compat6", Type.BOOL, False, "VMDK version 6 image", listed=True)
    hwversion: str | None = option(
        "hwversion", default="undefined", help="VMDK hardware version", listed=True
    )
    toolsversion: str | None = option("toolsversion", help="VMware guest tools version")
    subformat: str | None = option(
        "subformat",
        help="VMDK flat extent format, can be one of {monolithicSparse (default) | "
        "monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    )
    zeroed_grain: bool = option(
        "zeroed_grain",
        Type.BOOL,
        False,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    )
