"""blkdebug: makes storage fail, stop or be picky on demand, to test what stands above it."""

from __future__ import annotations

from lamina.block.driver import Driver
from lamina.block.options import Type, option
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.limits import Limits
    from lamina.block.node import Node
    from lamina.block.permissions import Perm

PREFIX = "blkdebug:"
_LARGEST = (1 << 31) - 1
"""Bytes: no request is longer, and no alignment wider."""


@dataclass(frozen=True)
class BlkdebugOptions:
    config: str | None = option("config", Type.STRING, None, "Path to the configuration file")
    image: str | None = option("x-image", Type.STRING, None, "name of the image")
    align: int = option("align", Type.SIZE, 0, "Required alignment in bytes")
    max_transfer: int = option("max-transfer", Type.SIZE, 0, "Maximum transfer size in bytes")
    opt_write_zero: int = option(
        "opt-write-zero", Type.SIZE, 0, "Optimum write zero alignment in bytes"
    )
    max_write_zero: int = option("max-write-zero", Type.SIZE, 0, "Maximum write zero size in bytes")
    opt_discard: int = option("opt-discard", Type.SIZE, 0, "Optimum discard alignment in bytes")
    max_discard: int = option("max-discard", Type.SIZE, 0, "Maximum discard size in bytes")


class BlkdebugDriver(Driver):
    name = "blkdebug"
    Options = BlkdebugOptions

    def parse_filename(self, filename: str) -> dict[str, Any]:
        """``blkdebug:CONFIG:IMAGE``; CONFIG may be empty. Raises UsageError.

        A name without the prefix (where the user named the driver) is that of the image.
        """
        if not filename.startswith(PREFIX):
            return {"x-image": filename}
        config, colon, image = filename.removeprefix(PREFIX).partition(":")
        if not colon:
            raise UsageError("blkdebug requires both config file and image path")
        return {"config": config, "x-image": image} if config else {"x-image": image}

    def open(self, options: BlkdebugOptions, context: OpenContext) -> Node:
        from lamina.filters.blkdebug.config import read_config, rules_from_options
        from lamina.filters.blkdebug.node import BlkdebugNode
        from lamina.filters.blkdebug.rules import Rules

        rules = read_config(options.config) if options.config else []
        for kind in ("inject-error", "set-state"):
            rules += rules_from_options(kind, context.take_options(f"{kind}."))
        taken = _permissions(context.take_options("take-child-perms."))
        unshared = _permissions(context.take_options("unshare-child-perms."))
        image = context.open_child("image", filename=options.image)
        return BlkdebugNode(
            context.node_options,
            image,
            Rules(rules),
            _limits(options, image.limits),
            taken=taken,
            unshared=unshared,
            given=context.image_option,
        )


def _permissions(given: dict[str, Any]) -> Perm:
    """A list of permissions by QEMU's names. Raises UsageError."""
    from lamina.block.permissions import NAMES, Perm

    by_name = {name.replace(" ", "-"): perm for perm, name in NAMES.items()}
    found = Perm.NONE
    for word in given.values():
        if word not in by_name:
            raise UsageError(f"Parameter 'null' does not accept value '{word}'")
        found |= by_name[word]
    return found


def _limits(options: BlkdebugOptions, below: Limits) -> Limits:
    """Raises UsageError for figures that do not go together."""
    from lamina.block.limits import Limits

    def fits(key: str, value: int, unit: int) -> int:
        if value and (value % unit or value > _LARGEST):
            raise UsageError(f"Cannot meet constraints with {key} {value}")
        return value

    align = options.align
    if align and (align & (align - 1) or align > _LARGEST):
        raise UsageError(f"Cannot meet constraints with align {align}")
    align = max(align, below.request_alignment)
    fits("max-transfer", options.max_transfer, align)
    fits("opt-write-zero", options.opt_write_zero, align)
    fits("max-write-zero", options.max_write_zero, max(options.opt_write_zero, align))
    fits("opt-discard", options.opt_discard, align)
    fits("max-discard", options.max_discard, max(options.opt_discard, align))
    return Limits(
        request_alignment=align,
        memory_alignment=below.memory_alignment,
        max_transfer=options.max_transfer or below.max_transfer,
        write_zeroes_alignment=options.opt_write_zero or below.write_zeroes_alignment,
        max_write_zeroes=options.max_write_zero or below.max_write_zeroes,
        discard_alignment=options.opt_discard or below.discard_alignment,
        max_discard=options.max_discard or below.max_discard,
        optimal_transfer=below.optimal_transfer,
    )


DRIVER = BlkdebugDriver()
