"""LUKS1 volumes, as cryptsetup and QEMU make them (LUKS On-Disk Format 1.x)."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import Driver, Measurement
from lamina.formats.luks.options import LuksAmendOptions, LuksCreateOptions, LuksOptions
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node


class LuksDriver(Driver):
    name = "luks"
    Options = LuksOptions
    CreateOptions = LuksCreateOptions
    AmendOptions = LuksAmendOptions
    is_format = True
    strong_options = ("key-secret",)
    metadata_is_whole = True

    def open(self, options: LuksOptions, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk
        from lamina.formats.luks.mapping import LuksMapping

        return Disk(context, lambda disk: LuksMapping(disk, options, context))

    def new_file_size(self, options: Any) -> int:
        from lamina.formats.luks.create import file_size

        return file_size(options)

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.luks.create import create

        create(options, file, context)

    def measure(
        self, options: Any, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.luks.create import file_size

        context.secrets.require(options.key_secret, "key-secret")
        if source is not None:
            options = replace(options, size=source.size)
        total = file_size(options)
        return Measurement(total, total)

    def amend(
        self, node: Node, options: Any, progress: Callable[[float], None], *, force: bool
    ) -> None:
        from lamina.engine.disk import exclusive
        from lamina.formats.luks.mapping import LuksMapping

        with exclusive(node, LuksMapping) as mapping:
            mapping.amend(options, mapping.disk.context.secrets, force=force)
        progress(1.0)


DRIVER = LuksDriver()
