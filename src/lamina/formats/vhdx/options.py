"""Options of the vhdx driver: those that QEMU documents, and what differencing images need."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass
from lamina.units import MIB

SUBFORMATS = ("dynamic", "fixed")


@dataclass(frozen=True)
class VhdxCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size; max of 64TB.")
    log_size: int = option("log_size", Type.SIZE, MIB, "Log size; min 1MB.", listed=True)
    block_size: int = option(
        "block_size",
        Type.SIZE,
        0,
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
        listed=True,
    )
    subformat: str | None = option(
        "subformat",
        Type.STRING,
        None,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
        choices=SUBFORMATS,
    )
    block_state_zero: bool = option(
        "block_state_zero",
        Type.BOOL,
        True,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to "
        "'off' when using 'qemu-img convert' with subformat=dynamic.",
    )
    logical_sector_size: int | None = option(
        "logical_sector_size",
        Type.NUMBER,
        None,
        "Bytes of a sector of the disk: 512 or 4096. Default is 512, or that of the parent.",
    )
    backing_file: str | None = option(
        "backing_file", help="File name of the parent, which makes it a differencing image"
    )
    backing_fmt: str | None = option("backing_fmt", help="Format of the parent: vhdx")
