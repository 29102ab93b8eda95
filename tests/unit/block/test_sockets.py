"""Socket addresses, and what listens and connects there."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from lamina.block.sockets import SocketAddress, connect, listen, parse_address, unix_name
from lamina.errors import StorageError, UsageError


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({"type": "inet", "host": "h", "port": 5}, SocketAddress("inet", "h", "5")),
        (
            {"type": "inet", "host": "h", "port": "nbd", "ipv6": "on", "keep-alive": True},
            SocketAddress("inet", "h", "nbd", ipv6=True, keep_alive=True),
        ),
        ({"type": "unix", "path": "/s"}, SocketAddress("unix", path="/s")),
        (
            {"type": "unix", "path": "s", "abstract": "on", "tight": "off"},
            SocketAddress("unix", path="s", abstract=True, tight=False),
        ),
        ({"type": "vsock", "cid": "3", "port": "4"}, SocketAddress("vsock", "3", "4")),
        ({"type": "fd", "str": "7"}, SocketAddress("fd", path="7")),
    ],
)
def test_addresses(given: dict[str, object], address: SocketAddress) -> None:
    assert parse_address(given) == address


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Parameter 'type' is missing"),
        ({"type": "ipx"}, "Parameter 'type' does not accept value 'ipx'"),
        ({"type": "inet", "host": "h"}, "Parameter 'port' is missing"),
        ({"type": "unix"}, "Parameter 'path' is missing"),
        ({"type": "unix", "path": "/s", "port": "1"}, "Parameter 'port' is unexpected"),
        ({"type": "unix", "path": "/s", "abstract": "?"}, "Parameter 'abstract' expects 'on'"),
    ],
)
def test_addresses_that_are_none(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(given)
    assert str(caught.value).startswith(message)


def exchange(address: SocketAddress, target: SocketAddress) -> None:
    listening = listen(address, 1)
    if target.port == "0":
        target = SocketAddress("inet", target.host, str(listening[0].getsockname()[1]))
    with connect(target, 5) as client:
        server, _ = listening[0].accept()
        with server:
            client.sendall(b"x")
            assert server.recv(1) == b"x"
        assert client.gettimeout() is None
        if client.family == socket.AF_INET:
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for one in listening:
        one.close()


def test_unix_sockets(tmp_path: Path) -> None:
    address = SocketAddress("unix", path=str(tmp_path / "s"))
    exchange(address, address)
    exchange(address, address)  # the old one is removed
    with pytest.raises(StorageError) as caught:
        connect(address)
    assert str(caught.value) == f"Failed to connect to '{address}': Connection refused"
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(StorageError, match=r"Failed to bind socket to .*: No such file or dir"):
        listen(SocketAddress("unix", path=str(tmp_path / "no" / "s")), 1)


def test_internet_sockets() -> None:
    address = SocketAddress("inet", "127.0.0.1", "0")
    exchange(address, address)
    with pytest.raises(StorageError, match=r"address resolution failed for nosuch.invalid:1: "):
        connect(SocketAddress("inet", "nosuch.invalid", "1"))
    with pytest.raises(StorageError, match="Failed to bind socket: Cannot assign requested"):
        listen(SocketAddress("inet", "1.2.3.4", "0"), 1)


@pytest.mark.skipif(not hasattr(socket, "SO_PASSCRED"), reason="names without files are Linux's")
def test_abstract_names(tmp_path: Path) -> None:
    name = str(tmp_path)[-80:]
    exchange(
        SocketAddress("unix", path=name, abstract=True), SocketAddress("unix", path=f"\0{name}")
    )
    assert len(unix_name(SocketAddress("unix", path=name, abstract=True, tight=False))) == 108
    with pytest.raises(UsageError, match="is too long"):
        unix_name(SocketAddress("unix", path="/" * 108))


def test_descriptors() -> None:
    one, other = socket.socketpair()
    with one, other, connect(SocketAddress("fd", path=str(other.fileno()))) as adopted:
        adopted.sendall(b"y")
        assert one.recv(1) == b"y"
    with pytest.raises(UsageError, match="No file descriptor named 'x'"):
        connect(SocketAddress("fd", path="x"))
