"""qcow version 1, the format before qcow2: backing files, compression, AES."""

from __future__ import annotations

from lamina.block.driver import Driver
from lamina.formats.qcow.options import QcowCreateOptions, QcowOptions
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node


class QcowDriver(Driver):
    name = "qcow"
    Options = QcowOptions
    CreateOptions = QcowCreateOptions
    is_format = True
    supports_backing = True
    supports_compression = True
    strong_options = ("encrypt.format", "encrypt.key-secret")

    def open(self, options: QcowOptions, context: OpenContext) -> Node:
        from lamina.engine.disk import Disk
        from lamina.formats.qcow.mapping import QcowMapping

        return Disk(context, lambda disk: QcowMapping(disk, options, context))

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        from lamina.formats.qcow.create import create

        create(options, file, context)

    def make_empty(self, node: Node) -> None:
        from lamina.engine.disk import exclusive
        from lamina.formats.qcow.empty import make_empty
        from lamina.formats.qcow.mapping import QcowMapping

        with exclusive(node, QcowMapping) as mapping:
            make_empty(mapping)


DRIVER = QcowDriver()
