"""From options to a connected node."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from lamina.block.session import log_warning
from lamina.block.sockets import SocketAddress, parse_address
from lamina.block.tls import TlsCredentials
from lamina.errors import Refused, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.protocols.nbd.connecting import Connector
from lamina.protocols.nbd.connections import Connections
from lamina.protocols.nbd.node import NbdNode
from lamina.wire.nbd import constants as nbd

if TYPE_CHECKING:
    from lamina.block.node import NodeOptions
    from lamina.protocols.nbd import NbdOptions


def open_nbd(
    options: NbdOptions,
    server: Mapping[str, Any],
    node_options: NodeOptions,
    objects: Mapping[str, object],
    warn: Callable[[str], None] = log_warning,
) -> NbdNode:
    address = _address(options, server)
    for value, key in (
        (options.reconnect_delay, "reconnect-delay"),
        (options.open_timeout, "open-timeout"),
    ):
        if not 0 <= value < 1 << 32:
            raise UsageError(f"Parameter '{key}' expects a number of seconds", field=key)
    if len(options.export.encode("utf-8", "surrogateescape")) > nbd.MAX_STRING:
        raise UsageError("export name too long to send to server")
    context = options.x_dirty_bitmap or nbd.BASE_ALLOCATION
    if len(context.encode("utf-8", "surrogateescape")) > nbd.MAX_STRING:
        raise UsageError("x-dirty-bitmap query too long to send to server")
    connector = Connector(
        address, options.export, context, _credentials(options, objects), options.tls_hostname
    )
    connections = Connections(
        connector,
        reconnect_delay=options.reconnect_delay,
        open_timeout=options.open_timeout,
        warn=warn,
    )
    try:
        agreed = connections.agreement
        if options.x_dirty_bitmap and options.x_dirty_bitmap not in agreed.contexts:
            raise UsageError(f"requested x-dirty-bitmap {options.x_dirty_bitmap} not found")
        read_only = node_options.read_only
        if agreed.export.flags & nbd.READ_ONLY and not read_only:
            if not node_options.auto_read_only:
                raise Refused("Could not open image: Permission denied", errno=errno.EACCES)
            read_only = True
        node = NbdNode(
            node_options,
            connections,
            address,
            is_bitmap=bool(options.x_dirty_bitmap),
            secure=options.tls,
        )
        node.read_only = read_only
    except BaseException:
        connections.close()
        raise
    return node


def _address(options: NbdOptions, server: Mapping[str, Any]) -> SocketAddress:
    old = options.host is not None or options.port is not None or options.path is not None
    if server:
        if old:
            raise UsageError("Cannot use 'server' and path/host/port at the same time")
        return parse_address(server)
    if options.path is not None:
        if options.host is not None:
            raise UsageError("path and host may not be used at the same time")
        if options.port is not None:
            raise UsageError("port may not be used without host")
        return SocketAddress("unix", path=options.path)
    if options.host is not None:
        return SocketAddress("inet", options.host, options.port or str(nbd.PORT))
    raise UsageError("NBD server address missing")


def _credentials(options: NbdOptions, objects: Mapping[str, object]) -> TlsCredentials | None:
    name = options.tls_creds
    if name is not None:
        found = objects.get(name)
        if found is None:
            raise UsageError(f"No TLS credentials with id '{name}'")
        if not isinstance(found, TlsCredentials):
            raise UsageError(f"Object with id '{name}' is not TLS credentials")
        if found.endpoint != "client":
            raise UsageError("Expecting TLS credentials with a client endpoint")
        return found
    if not options.tls:
        return None
    if options.tls_type not in ("x509", "psk", "anon"):
        raise UsageError(f"Parameter 'tls-type' does not accept value '{options.tls_type}'")
    if options.tls_verify_peer not in ("0", "1"):
        raise UsageError("Parameter 'tls-verify-peer' expects 0 or 1")
    credentials = TlsCredentials(
        options.tls_type,
        dir=options.tls_certificates,
        verify_peer=options.tls_verify_peer == "1",
        username=options.tls_username or "qemu",
        keys_file=options.tls_psk_file,
    )
    credentials.check()
    return credentials
