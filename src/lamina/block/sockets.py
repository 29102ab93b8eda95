"""Where servers are: socket addresses as QEMU's options describe them, and what connects to them.

An address is given as ``type`` (``inet``, ``unix``, ``vsock`` or ``fd``) and what belongs to it:
``host`` and ``port``, ``path``, ``cid`` and ``port``, ``str``.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from lamina.block.options import Spec, Type, convert
from lamina.errors import StorageError, UsageError
from lamina.hints import Any
from lamina.records import dataclass

_FIELDS = {
    "inet": ("host", "port", "numeric", "to", "ipv4", "ipv6", "keep-alive", "mptcp"),
    "unix": ("path", "abstract", "tight"),
    "vsock": ("cid", "port"),
    "fd": ("str",),
}
_NEEDED = {"inet": ("host", "port"), "unix": ("path",), "vsock": ("cid", "port"), "fd": ("str",)}


@dataclass(frozen=True)
class SocketAddress:
    """One place that a server can be at."""

    type: str
    host: str = ""
    """inet; the context id of a vsock."""
    port: str = ""
    """A number or the name of a service."""
    path: str = ""
    """unix; the name or number of a descriptor that is connected already."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    """None: whatever the name resolves to; one of them True: only that."""
    keep_alive: bool = False
    abstract: bool = False
    """unix: a name in Linux's abstract namespace, no file."""
    tight: bool = True
    """abstract: the name ends with its last byte, not filled up with NULs."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.type in ("inet", "vsock") else self.path


def parse_address(given: Mapping[str, Any]) -> SocketAddress:
    """Out of the options of one address. Raises UsageError."""
    options = dict(given)
    if "type" not in options:
        raise UsageError("Parameter 'type' is missing")
    kind = str(options.pop("type"))
    if kind not in _FIELDS:
        raise UsageError(f"Parameter 'type' does not accept value '{kind}'")
    for key in _NEEDED[kind]:
        if options.get(key) is None:
            raise UsageError(f"Parameter '{key}' is missing")
    for key in options:
        if key not in _FIELDS[kind]:
            raise UsageError(f"Parameter '{key}' is unexpected")

    def flag(key: str, default: bool | None) -> Any:
        value = options.get(key)
        return default if value is None else convert(Spec(key, Type.BOOL, ""), value)

    return SocketAddress(
        kind,
        host=str(options["cid" if kind == "vsock" else "host"]) if "port" in options else "",
        port=str(options.get("port", "")),
        path=str(options.get("path", options.get("str", ""))),
        ipv4=flag("ipv4", None),
        ipv6=flag("ipv6", None),
        keep_alive=flag("keep-alive", False),
        abstract=flag("abstract", False),
        tight=flag("tight", True),
    )


def connect(address: SocketAddress, timeout: float | None = None) -> socket.socket:
    """A connected socket without a timeout. Raises StorageError.

    ``timeout``: seconds that each attempt may take.
    """
    if address.type == "fd":
        return _adopted(address.path)
    trouble: OSError | None = None
    for family, target in _targets(address):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(target)
            connection.settimeout(None)
            prepare(connection, keep_alive=address.keep_alive)
            return connection
        except OSError as error:
            connection.close()
            trouble = error
        except BaseException:
            connection.close()
            raise
    number = (trouble.errno if trouble else None) or errno.ETIMEDOUT
    raise StorageError(f"Failed to connect to '{address}': {os.strerror(number)}", errno=number)


def listen(address: SocketAddress, backlog: int) -> list[socket.socket]:
    """Sockets on which connections arrive, an older Unix socket of that name removed.

    Raises StorageError.
    """
    if address.type == "unix":
        return [_listen_unix(address, backlog)]
    found: list[socket.socket] = []
    trouble: OSError | None = None
    targets = resolve(address, passive=True) if address.type == "inet" else _targets(address)
    for family, target in targets:
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(target)
            one.listen(backlog)
            found.append(one)
        except OSError as error:
            one.close()
            trouble = error
    if not found:
        text = (trouble.strerror if trouble else None) or "no address"
        number = trouble.errno if trouble else errno.EINVAL
        raise StorageError(f"Failed to bind socket: {text}", errno=number)
    return found


def _listen_unix(address: SocketAddress, backlog: int) -> socket.socket:
    name = unix_name(address)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not address.abstract:
            with suppress(FileNotFoundError):
                os.unlink(address.path)
        one.bind(name)
        one.listen(backlog)
    except OSError as error:
        one.close()
        raise StorageError(
            f"Failed to bind socket to {address.path}: {error.strerror}", errno=error.errno
        ) from None
    return one


def prepare(connection: socket.socket, *, keep_alive: bool = False) -> None:
    """Small messages leave at once, and large ones find room."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keep_alive:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    elif connection.family == socket.AF_UNIX:  # TCP finds the right size by itself
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_ROOM)


def unix_name(address: SocketAddress) -> str | bytes:
    """What the host calls a Unix socket. Raises UsageError for a path that it cannot have."""
    name = os.fsencode(address.path)
    if address.abstract:
        name = b"\0" + name
        return name if address.tight else name.ljust(_UNIX_LENGTH, b"\0")
    if len(name) > _UNIX_LENGTH - 1:
        raise UsageError(
            f"UNIX socket path '{address.path}' is too long",
            hint=f"Path must be less than {_UNIX_LENGTH} bytes",
        )
    return name


_UNIX_LENGTH = 108
"""Bytes of sockaddr_un.sun_path."""
_UNIX_ROOM = 1 << 20
"""Bytes that may be on their way through a Unix socket. The host's default is less than one message
of a busy client, and the two sides would always be waiting for each other."""


def resolve(address: SocketAddress, *, passive: bool = False) -> list[tuple[int, Any]]:
    """Families and addresses of an ``inet`` address. Raises StorageError."""
    family: int = socket.AF_UNSPEC
    if address.ipv4 or address.ipv6 is False:
        family = socket.AF_INET
    if address.ipv6 or address.ipv4 is False:
        family = socket.AF_UNSPEC if family == socket.AF_INET and address.ipv4 else socket.AF_INET6
    host = address.host or (None if passive else "")
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = socket.getaddrinfo(host, address.port, family, socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        text = error.strerror if isinstance(error, socket.gaierror) else "Name is malformed"
        raise StorageError(
            f"address resolution failed for {address}: {text}", errno=errno.EINVAL
        ) from None
    return [(one[0], one[4]) for one in found]


def _targets(address: SocketAddress) -> list[tuple[int, Any]]:
    if address.type == "inet":
        return resolve(address)
    if address.type == "unix":
        if not hasattr(socket, "AF_UNIX"):
            raise StorageError("Unix sockets are not supported", errno=errno.EAFNOSUPPORT)
        return [(socket.AF_UNIX, unix_name(address))]
    if not hasattr(socket, "AF_VSOCK"):
        raise StorageError("socket family AF_VSOCK unsupported", errno=errno.EAFNOSUPPORT)
    try:
        return [(socket.AF_VSOCK, (int(address.host, 0), int(address.port, 0)))]
    except ValueError:
        raise UsageError(f"Failed to parse cid '{address.host}' or port '{address.port}'") from None


def _adopted(name: str) -> socket.socket:
    """The socket with that descriptor, which we inherited."""
    try:
        return socket.socket(fileno=os.dup(int(name)))
    except ValueError:
        raise UsageError(f"No file descriptor named '{name}'") from None
    except OSError:
        raise UsageError(f"File descriptor '{name}' is not a socket") from None
