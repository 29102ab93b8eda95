"""VMDK: the disks of VMware, hosted or on ESX, in one file or many."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix, Measurement
from lamina.formats.vmdk.options import VmdkCreateOptions
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node
    from lamina.formats.vmdk.mapping import VmdkMapping


class VmdkDriver(Driver):
    name = "vmdk"
    CreateOptions = VmdkCreateOptions
    is_format = True
    supports_backing = True
    supports_compression = True

    def open(self, options: Any, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk
        from lamina.formats.vmdk.mapping import VmdkMapping

        return Disk(context, lambda disk: VmdkMapping(disk, context))

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.vmdk.create import create

        create(options, file, context)

    def measure(
        self, options: Any, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.vmdk.measure import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.formats.vmdk.check import check

        with _exclusive(node) as mapping:
            return check(mapping, fix, report)

    def make_empty(self, node: Node) -> None:
        from lamina.formats.vmdk.empty import make_empty

        with _exclusive(node) as mapping:
            mapping.disk.writer.open_gate()
            make_empty(mapping)


def _exclusive(node: Node) -> AbstractContextManager[VmdkMapping]:
    from lamina.engine.disk import exclusive
    from lamina.formats.vmdk.mapping import VmdkMapping

    return exclusive(node, VmdkMapping)


DRIVER = VmdkDriver()
