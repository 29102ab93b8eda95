"""Network block devices: the client.

``server.…`` (or the older ``host``, ``port``, ``path``) says where the server is, ``export`` what
of it to open, ``tls-creds`` which credentials object secures the connection. After a disconnection
requests wait up to ``reconnect-delay`` seconds for the server to come back.
"""

from __future__ import annotations

from lamina.block.driver import Driver
from lamina.block.options import Type, option
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.node import Node


@dataclass(frozen=True)
class NbdOptions:
    host: str | None = option("host", Type.STRING, None, "TCP host to connect to")
    port: str | None = option("port", Type.STRING, None, "TCP port to connect to")
    path: str | None = option("path", Type.STRING, None, "Unix socket path to connect to")
    export: str = option("export", Type.STRING, "", "Name of the NBD export to open")
    tls_creds: str | None = option(
        "tls-creds", Type.STRING, None, "ID of the TLS credentials to use"
    )
    tls_hostname: str | None = option(
        "tls-hostname", Type.STRING, None, "Override hostname for validating TLS x509 certificate"
    )
    x_dirty_bitmap: str | None = option(
        "x-dirty-bitmap", Type.STRING, None, "expose named dirty bitmap in place of block status"
    )
    reconnect_delay: int = option(
        "reconnect-delay",
        Type.NUMBER,
        0,
        "seconds that requests wait for a lost connection to come back, before they fail",
    )
    open_timeout: int = option(
        "open-timeout", Type.NUMBER, 0, "seconds for which connecting is tried again and again"
    )
    tls: bool = option("tls", Type.BOOL, False, "nbds: TLS is used, without a credentials object")
    tls_type: str = option("tls-type", Type.STRING, "x509", "nbds: x509, psk or anon")
    tls_username: str | None = option("tls-username", Type.STRING, None, "nbds: user for psk")
    tls_verify_peer: str = option(
        "tls-verify-peer", Type.STRING, "1", "nbds: whether the certificate is verified (0, 1)"
    )
    tls_certificates: str | None = option(
        "tls-certificates", Type.STRING, None, "nbds: directory of the certificates"
    )
    tls_psk_file: str | None = option("tls-psk-file", Type.STRING, None, "nbds: file of the keys")


@dataclass(frozen=True)
class NbdCreateOptions:
    size: int = option("size", Type.SIZE, 0, "Virtual disk size")


class NbdDriver(Driver):
    name = "nbd"
    Options = NbdOptions
    CreateOptions = NbdCreateOptions

    def parse_filename(self, filename: str) -> dict[str, Any]:
        from lamina.protocols.nbd.naming import parse_name

        return parse_name(filename)

    def open(self, options: NbdOptions, context: OpenContext) -> Node:
        """Raises UsageError, StorageError where the server cannot be reached or does not want, and
        Refused for writing to a read-only export."""
        from lamina.protocols.nbd.opening import open_nbd

        server = context.take_options("server.")
        return open_nbd(
            options, server, context.node_options, context.objects, context.warn
        )

    def create_file(
        self, filename: str, options: NbdCreateOptions, context: CreateContext
    ) -> None:
        """There is nothing to make, only to see that it is large enough, and to forget what it
        held: its first sector."""
        from lamina.block.node import NodeOptions
        from lamina.block.options import parse
        from lamina.block.permissions import Perm
        from lamina.protocols.nbd.opening import open_nbd
        from lamina.units import SECTOR

        try:
            given = self.parse_filename(filename)
            server = {
                key.removeprefix("server."): given.pop(key)
                for key in list(given)
                if key.startswith("server.")
            }
            found: NbdOptions
            found, _ = parse(NbdOptions, given)
            node = open_nbd(found, server, NodeOptions(read_only=False), {})
        except LaminaError as error:
            raise error.in_context(
                "Protocol driver 'nbd' does not support creating new images, so an existing image "
                "must be selected as the target; however, opening the given target as an existing "
                "image failed: "
            ) from None
        with node:
            node.used_by(None, "creation", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
            if options.size > node.size:
                raise UsageError("Cannot grow NBD nodes")
            if node.size:
                node.write_zeroes(0, min(SECTOR, node.size))


DRIVER = NbdDriver()
