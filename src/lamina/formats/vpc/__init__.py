"""VHD, the disk images of Virtual PC, Hyper-V and Azure: fixed, dynamic and differencing."""

from __future__ import annotations

from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix, Measurement
from lamina.formats.vpc.options import VpcCreateOptions, VpcOptions
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node
    from lamina.formats.vpc.mapping import VpcMapping


class VpcDriver(Driver):
    name = "vpc"
    Options = VpcOptions
    CreateOptions = VpcCreateOptions
    is_format = True
    supports_backing = True
    strong_options = ("force_size_calc",)

    def open(self, options: VpcOptions, context: OpenContext) -> Node:
        from lamina.formats.vpc.opening import open_disk

        return open_disk(options, context)

    def new_file_size(self, options: Any) -> int:
        from lamina.formats.vpc.create import file_size

        return file_size(options)

    def create(self, options: VpcCreateOptions, file: Node, context: CreateContext) -> None:
        from lamina.formats.vpc.create import create

        create(options, file, context)

    def measure(
        self, options: VpcCreateOptions, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.vpc.measure import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.formats.vpc.check import check

        with _exclusive(node) as mapping:
            return check(mapping, fix, report)

    def change_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.formats.vpc.rebase import change_parent

        with _exclusive(node) as mapping:
            change_parent(mapping, filename, format)

    def check_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.formats.vpc.rebase import check_change

        with _exclusive(node) as mapping:
            check_change(mapping, filename, format)

    def make_empty(self, node: Node) -> None:
        from lamina.formats.vpc.empty import make_empty

        with _exclusive(node) as mapping:
            make_empty(mapping)


def _exclusive(node: Node) -> AbstractContextManager[VpcMapping]:
    from lamina.engine.disk import exclusive
    from lamina.formats.vpc.mapping import VpcMapping

    return exclusive(node, VpcMapping)  # type: ignore[type-abstract]


DRIVER = VpcDriver()
