"""parallels: expandable images, and bundles of them with snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lamina.block.driver import CheckResult, Driver, Fix
from lamina.formats.parallels.options import ParallelsCreateOptions, ParallelsOptions

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node


class ParallelsDriver(Driver):
    name = "parallels"
    Options = ParallelsOptions
    CreateOptions = ParallelsCreateOptions
    is_format = True

    def open(self, options: ParallelsOptions, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk
        from lamina.formats.parallels.mapping import ParallelsMapping

        return Disk(context, lambda disk: ParallelsMapping(disk, options, context))

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.parallels.create import create

        create(options, file)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.engine.disk import Disk
        from lamina.formats.parallels.check import check
        from lamina.formats.parallels.mapping import ParallelsMapping

        assert isinstance(node, Disk)
        assert isinstance(node.mapping, ParallelsMapping)
        with node.exclusive():
            return check(node.mapping, fix, report)


DRIVER = ParallelsDriver()
