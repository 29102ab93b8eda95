"""Options of the vpc driver, as QEMU documents them, and a backing file."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass


@dataclass(frozen=True)
class VpcOptions:
    force_size_calc: str | None = option(
        "force_size_calc",
        help="Force disk size calculation to use either CHS geometry, or use the disk "
        "current_size specified in the VHD footer. {chs, current_size}",
    )


@dataclass(frozen=True)
class VpcCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    subformat: str = option(
        "subformat",
        Type.STRING,
        "dynamic",
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
        choices=("dynamic", "fixed"),
    )
    force_size: bool = option(
        "force_size",
        Type.BOOL,
        False,
        "Force disk size calculation to use the actual size specified, rather than using the "
        "nearest CHS-based calculation",
    )
    backing_file: str | None = option(
        "backing_file", help="File name of the parent that a differencing image is made of"
    )
    backing_fmt: str | None = option("backing_fmt", help="Format of the parent: vpc")
