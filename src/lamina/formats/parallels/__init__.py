"""parallels: expandable images, and bundles of them with snapshots."""

from __future__ import annotations

import errno
from collections.abc import Callable

from lamina.block.driver import CheckResult, Driver, Fix
from lamina.errors import ImageUnsupported
from lamina.formats.parallels.options import ParallelsCreateOptions, ParallelsOptions
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.engine.mapping import Mapping

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ParallelsDriver(Driver):
    name = "parallels"
    Options = ParallelsOptions
    CreateOptions = ParallelsCreateOptions
    is_format = True

    def open(self, options: ParallelsOptions, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk

        return Disk(context, lambda disk: _load(disk, options, context))

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.parallels.create import create

        create(options, file)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.engine.disk import Disk
        from lamina.formats.parallels.check import check
        from lamina.formats.parallels.mapping import ParallelsMapping

        assert isinstance(node, Disk)
        if not isinstance(node.mapping, ParallelsMapping):
            return super().check(node, fix, report)
        with node.exclusive():
            return check(node.mapping, fix, report)

    def load_snapshot(self, node: Node, name: str) -> None:
        from lamina.engine.disk import Disk
        from lamina.formats.parallels.bundle import BundleMapping

        assert isinstance(node, Disk)
        if not isinstance(node.mapping, BundleMapping):
            super().load_snapshot(node, name)
            return
        if name not in node.mapping.descriptor.parents:
            raise ImageUnsupported("Can't find snapshot", errno=errno.ENOENT)
        with node.exclusive():
            node.mapping.show(name)


def _load(disk: Disk, options: ParallelsOptions, context: OpenContext) -> Mapping:
    """An expandable image or, if the file is a disk descriptor, all that it names."""
    from lamina.formats.parallels.layout import DESCRIPTOR_ROOT

    root = DESCRIPTOR_ROOT.encode()
    head = disk.file.read(0, min(disk.file.size, 512))
    if head.lstrip(_BYTE_ORDER_MARK).startswith(b"<") and b"<" + root in head:
        from lamina.formats.parallels.bundle import BundleMapping

        return BundleMapping(disk, context)
    from lamina.formats.parallels.mapping import ParallelsMapping

    return ParallelsMapping(disk, options, context)


DRIVER = ParallelsDriver()
