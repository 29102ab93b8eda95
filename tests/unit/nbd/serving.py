"""A server of ours in this process, and certificates for it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.block.backend import Backend
from lamina.block.session import Session
from lamina.block.sockets import SocketAddress, listen
from lamina.block.tls import TlsCredentials
from lamina.exports.nbd import Export, Limits, Server
from lamina.protocols.nbd import NbdOptions
from lamina.protocols.nbd.opening import open_nbd
from lamina.records import replace
from lamina.wire.nbd.messages import BlockSizes


class Serving:
    """One export of a raw file on a Unix socket."""

    def __init__(self, path: Path, *, size: int = 1 << 20, content: bytes | None = None) -> None:
        self.disk = path / "disk"
        self.socket = path / "socket"
        self.log: list[str] = []
        if not self.disk.exists():
            self.disk.write_bytes(content or b"")
            if content is None:
                os.truncate(self.disk, size)
        self.server: Server | None = None

    def start(
        self,
        *,
        writable: bool = True,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        tls: TlsCredentials | None = None,
        block: int = 1,
        backend: Backend | None = None,
        **how: Any,
    ) -> Server:
        self.backend = backend or Backend.open(
            str(self.disk),
            session=Session(),
            format="raw",
            writable=writable,
            discard="unmap",
        )
        export = Export(self.backend, name="disk", **how)
        sizes = BlockSizes(block, max(block, 4096))
        export.description = replace(export.description, sizes=sizes)
        self.server = Server(
            limits=limits, tls=tls.context() if tls else None, log=self.log.append
        )
        self.server.add_export(export)
        self.server.listen(listen(SocketAddress("unix", path=str(self.socket)), 300))
        return self.server

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            self.backend.close()
            self.server = None

    @property
    def options(self) -> dict[str, Any]:
        return {
            "driver": "nbd",
            "server.type": "unix",
            "server.path": str(self.socket),
            "export": "disk",
        }

    def connect(self) -> socket.socket:
        """Without a handshake; also where more want to connect than the host lets wait."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        deadline = time.monotonic() + 10
        while True:
            try:
                connection.connect(str(self.socket))
                return connection
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.001)


@contextmanager
def serving(path: Path, **how: Any) -> Iterator[Serving]:
    one = Serving(path, **{key: how.pop(key) for key in ("size", "content") if key in how})
    one.start(**how)
    try:
        yield one
    finally:
        one.stop()


def open_export(serving: Serving, *, read_only: bool = False, **options: Any) -> Any:
    """A node in use."""
    from lamina.block.node import NodeOptions
    from lamina.block.permissions import Perm

    given = NbdOptions(export="disk", **options)
    server = {"type": "unix", "path": str(serving.socket)}
    node_options = NodeOptions(read_only=read_only, unmap=True)
    node = open_nbd(given, server, node_options, {}, serving.log.append)
    perm = Perm.CONSISTENT_READ if read_only else Perm.CONSISTENT_READ | Perm.WRITE
    node.used_by(None, "test", perm, Perm.ALL)
    return node


# -- certificates ----------------------------------------------------------------------------------


def make_certificates(path: Path) -> None:
    """``ca-``, ``server-`` and ``client-cert.pem`` and keys; the server is ``localhost``."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    path.mkdir(exist_ok=True)

    def name(text: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests, Inc."),
                x509.NameAttribute(NameOID.COMMON_NAME, text),
            ]
        )

    ca_key = ec.generate_private_key(ec.SECP256R1())
    for who in ("ca", "server", "client"):
        key = ca_key if who == "ca" else ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(who))
            .issuer_name(name("ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(who == "ca", None), critical=True)
        )
        if who == "server":
            names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(ca_key, hashes.SHA256())
        (path / f"{who}-cert.pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
        (path / f"{who}-key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


def make_keys(path: Path, *users: str) -> None:
    """``keys.psk`` with a key for each."""
    path.mkdir(exist_ok=True)
    lines = [f"{user}:{os.urandom(32).hex()}\n" for user in users]
    (path / "keys.psk").write_text("".join(lines))
