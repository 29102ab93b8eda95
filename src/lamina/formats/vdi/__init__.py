"""VDI, the disk images of VirtualBox: dynamic, static, and differencing ones with their parent."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix, Measurement
from lamina.formats.vdi.options import VdiCreateOptions
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.driver import NoOptions
    from lamina.block.node import Node


class VdiDriver(Driver):
    name = "vdi"
    CreateOptions = VdiCreateOptions
    is_format = True

    def open(self, options: NoOptions, context: OpenContext) -> Node:
        from lamina.formats.vdi.opening import open_disk

        return open_disk(context)

    def create(self, options: VdiCreateOptions, file: Node, context: CreateContext) -> None:
        from lamina.formats.vdi.create import create

        create(options, file)

    def measure(
        self, options: VdiCreateOptions, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.vdi.create import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.engine.disk import exclusive
        from lamina.formats.vdi.check import check
        from lamina.formats.vdi.mapping import VdiMapping

        with exclusive(node, VdiMapping) as mapping:
            return check(mapping, fix, report)


DRIVER = VdiDriver()
