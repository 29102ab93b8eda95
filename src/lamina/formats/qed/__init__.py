"""QED, the "QEMU enhanced disk": two levels of tables, backing files, and little else."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix, Measurement
from lamina.formats.qed.options import QedCreateOptions
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.driver import NoOptions
    from lamina.block.node import Node
    from lamina.formats.qed.mapping import QedMapping


class QedDriver(Driver):
    name = "qed"
    CreateOptions = QedCreateOptions
    is_format = True
    supports_backing = True

    def open(self, options: NoOptions, context: OpenContext) -> Node:
        from lamina.formats.qed.opening import open_disk

        return open_disk(context)

    def create(self, options: QedCreateOptions, file: Node, context: CreateContext) -> None:
        from lamina.formats.qed.create import create

        create(options, file)

    def measure(
        self, options: QedCreateOptions, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.qed.measure import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.formats.qed.check import check

        with _exclusive(node) as mapping:
            return check(mapping, fix, report)

    def change_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.formats.qed.header import change_backing_file

        with _exclusive(node) as mapping:
            change_backing_file(mapping, filename, format)

    def make_empty(self, node: Node) -> None:
        from lamina.formats.qed.header import make_empty

        with _exclusive(node) as mapping:
            make_empty(mapping)


def _exclusive(node: Node) -> AbstractContextManager[QedMapping]:
    from lamina.engine.disk import exclusive
    from lamina.formats.qed.mapping import QedMapping

    return exclusive(node, QedMapping)


DRIVER = QedDriver()
