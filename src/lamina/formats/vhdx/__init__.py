"""VHDX, the disk of Hyper-V: dynamic, fixed and differencing images, with a log of metadata."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix, Measurement
from lamina.formats.vhdx.options import VhdxCreateOptions
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node
    from lamina.formats.vhdx.mapping import VhdxMapping


class VhdxDriver(Driver):
    name = "vhdx"
    CreateOptions = VhdxCreateOptions
    is_format = True
    supports_backing = True

    def open(self, options: Any, context: OpenContext) -> Node:
        from lamina.formats.vhdx.opening import open_disk

        return open_disk(context)

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.vhdx.create import create

        create(options, file, context)

    def measure(self, options: Any, source: Node | None, context: CreateContext) -> Measurement:
        from lamina.formats.vhdx.measure import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.formats.vhdx.check import check

        with _exclusive(node) as mapping:
            return check(mapping, fix, report)

    def change_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.formats.vhdx.parent import change_parent

        with _exclusive(node) as mapping:
            change_parent(mapping, filename, format)

    def check_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.engine.disk import mapping_of
        from lamina.formats.vhdx.mapping import VhdxMapping
        from lamina.formats.vhdx.parent import check_change

        check_change(mapping_of(node, VhdxMapping), format)

    def make_empty(self, node: Node) -> None:
        from lamina.formats.vhdx.parent import make_empty

        with _exclusive(node) as mapping:
            mapping.disk.writer.open_gate()
            make_empty(mapping)


def _exclusive(node: Node) -> AbstractContextManager[VhdxMapping]:
    from lamina.engine.disk import exclusive
    from lamina.formats.vhdx.mapping import VhdxMapping

    return exclusive(node, VhdxMapping)


DRIVER = VhdxDriver()
