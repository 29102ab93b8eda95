"""Making a connection: the socket, the handshake, TLS."""

from __future__ import annotations

import errno
import socket
import time

from lamina.block.sockets import SocketAddress, connect
from lamina.errors import LaminaError, StorageError
from lamina.hints import TYPE_CHECKING
from lamina.protocols.nbd.channels import PlainChannel, TlsChannel, ended
from lamina.protocols.nbd.link import Link
from lamina.wire.nbd import steps
from lamina.wire.nbd.agreement import Description, Style
from lamina.wire.nbd.negotiation_client import Wish, list_exports, negotiate

if TYPE_CHECKING:
    import ssl

    from lamina.block.tls import TlsCredentials


_TLS_ENDED = "Cannot read from TLS channel: The TLS connection was non-properly terminated."


class Connector:
    """Knows all that it takes to connect, once or again."""

    def __init__(
        self,
        address: SocketAddress,
        export: str,
        context: str,
        credentials: TlsCredentials | None,
        hostname: str | None,
    ) -> None:
        """``context``: the metadata context to select; ``hostname``: of the certificate, if not
        that of the address."""
        self.address = address
        self._wish = Wish(export, tls=credentials is not None, contexts=(context,))
        self._tls = credentials.context() if credentials else None
        self._hostname = hostname or (address.host if address.type == "inet" else None)

    def connect(self, timeout: float | None = None) -> Link:
        """A connection to the export. Raises LaminaError; StorageError (ETIMEDOUT) after
        ``timeout`` seconds."""
        carrier = _Carrier(
            connect(self.address, timeout), self._tls, self._hostname, timeout
        )
        try:
            agreement = steps.run(negotiate(self._wish), carrier)
            return Link(carrier.channel(), agreement)
        except BaseException:
            carrier.close()
            raise


def list_of_exports(
    address: SocketAddress, credentials: TlsCredentials | None, hostname: str | None
) -> tuple[Style, list[Description]]:
    """What a server offers. Raises LaminaError."""
    context = credentials.context() if credentials else None
    hostname = hostname or (address.host if address.type == "inet" else None)
    carrier = _Carrier(connect(address), context, hostname, None)
    try:
        return steps.run(list_exports(tls=context is not None), carrier)
    finally:
        carrier.close()


def shake_hands(connection: socket.socket, export: str) -> int:
    """Choose an export on behalf of the kernel, which knows simple replies only.

    Returns the transmission flags. Raises LaminaError.
    """
    carrier = _Carrier(connection, None, None, None)
    agreed = steps.run(negotiate(Wish(export, highest=Style.SIMPLE)), carrier)
    return agreed.export.flags


class _Carrier:
    """Carries a handshake; it has to be over in ``timeout`` seconds, if any."""

    def __init__(
        self,
        connection: socket.socket,
        tls: ssl.SSLContext | None,
        hostname: str | None,
        timeout: float | None,
    ) -> None:
        self._socket = connection
        self._tls = tls
        self._hostname = hostname
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._secured: ssl.SSLSocket | None = None

    def _limit(self) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise StorageError.from_errno(errno.ETIMEDOUT)
            self._socket.settimeout(left)

    def send(self, data: bytes) -> None:
        self._limit()
        try:
            self._socket.sendall(data)
        except OSError as error:
            text = self._text(error)
            raise StorageError(f"Failed to write data: {text}", errno=errno.EIO) from None

    def receive(self, length: int, what: str) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        try:
            while len(view):
                self._limit()
                count = self._socket.recv_into(view)
                if not count:
                    raise ended()
                view = view[count:]
        except OSError as error:
            text = self._text(error)
            raise StorageError(f"Failed to read {what}: {text}", errno=errno.EIO) from None
        except LaminaError as error:
            text = str(error) if self._secured is None else _TLS_ENDED
            raise StorageError(f"Failed to read {what}: {text}", errno=errno.EIO) from None
        return bytes(data)

    def _text(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return "it takes too long"
        if self._secured is not None:
            return _TLS_ENDED
        return f"Unable to read from socket: {error.strerror or error}"

    def start_tls(self) -> None:
        from lamina.block.tls import secure

        assert self._tls is not None
        self._limit()
        self._socket = self._secured = secure(
            self._socket, self._tls, server=False, hostname=self._hostname
        )

    def channel(self) -> PlainChannel:
        self._socket.settimeout(None)
        if self._secured is not None:
            return TlsChannel(self._secured)
        return PlainChannel(self._socket)

    def close(self) -> None:
        self._socket.close()

