"""dmg: Apple's disk images (UDIF), for reading."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node


class DmgDriver(Driver):
    name = "dmg"
    is_format = True

    def open(self, options: Any, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk
        from lamina.formats.dmg.mapping import DmgMapping

        return Disk(context, DmgMapping)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.engine.disk import mapping_of
        from lamina.formats.dmg.check import check
        from lamina.formats.dmg.mapping import DmgMapping

        return check(mapping_of(node, DmgMapping), report)


DRIVER = DmgDriver()
