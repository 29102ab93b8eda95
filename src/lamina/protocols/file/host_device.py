"""host_device and host_cdrom: block and character devices, whose names choose them."""

from __future__ import annotations

from lamina.block.driver import Driver
from lamina.block.options import Type, option
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.protocols.file import FileOptions, check_options
from lamina.records import dataclass
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node


@dataclass(frozen=True)
class DeviceCreateOptions:
    preallocation: str = option(
        "preallocation", Type.STRING, "off", "Preallocation mode (allowed values: off)"
    )
    size: int = option("size", Type.SIZE, 0, "Virtual disk size")


class HostDeviceDriver(Driver):
    """Both drivers of devices; they differ in the kind of node."""

    Options = FileOptions
    CreateOptions = DeviceCreateOptions

    def __init__(self, name: str) -> None:
        self.name = name

    def parse_filename(self, filename: str) -> dict[str, Any]:
        return {"filename": filename.removeprefix(f"{self.name}:")}

    def open(self, options: FileOptions, context: OpenContext) -> Node:
        from lamina.protocols.file.device import open_device

        check_options(self.name, options, direct=context.node_options.direct)
        return open_device(self.name, options, context.node_options)

    def create_file(
        self, filename: str, options: DeviceCreateOptions, context: CreateContext
    ) -> None:
        """There is nothing to make, only to see that it is large enough, and to forget what it
        held: its first sector. Raises Busy, UsageError or StorageError."""
        from lamina.block.node import NodeOptions
        from lamina.block.permissions import Perm
        from lamina.protocols.file.device import open_device

        if options.preallocation != "off":
            raise UsageError(f"Unsupported preallocation mode '{options.preallocation}'")
        path = filename.removeprefix(f"{self.name}:")
        with open_device(
            self.name, FileOptions(filename=path), NodeOptions(read_only=False)
        ) as node:
            perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
            node.used_by(None, "creation", perm, Perm.ALL)
            node.truncate(options.size, exact=False)
            if node.size:
                node.write(0, bytes(min(SECTOR, node.size)))


DRIVER = HostDeviceDriver("host_device")
CDROM_DRIVER = HostDeviceDriver("host_cdrom")
