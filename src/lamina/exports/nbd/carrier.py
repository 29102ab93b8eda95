"""What carries bytes to a client and back: with a deadline during the handshake, and with no
patience for clients that do not take their answers."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from lamina.block.tls import ENDED
from lamina.errors import StorageError
from lamina.hints import TYPE_CHECKING
from lamina.wire.nbd.steps import ProtocolError

if TYPE_CHECKING:
    import ssl

    from lamina.block.node import Node
    from lamina.block.tls import Authorization

_MORE: int = getattr(socket, "MSG_MORE", 0)
_NO_WAIT: int = getattr(socket, "MSG_DONTWAIT", 0)
_GLANCES = 20 if _NO_WAIT else 0
"""How often to look whether the client has asked again, before going to sleep: for some 40 µs."""
_SOON = 100e-6
"""Seconds within which a client that keeps a server busy asks again."""
_STALLED = (errno.EAGAIN, errno.EWOULDBLOCK)
_GONE = (*_STALLED, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT)
"""What sending fails with on behalf of the connection, not of the file that is sent."""


class Carrier:
    """A connection that was accepted. OSErrors come out as StorageErrors with a sentence."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        tls: ssl.SSLContext | None,
        authorization: Authorization | None,
        handshake_seconds: float,
    ) -> None:
        """``handshake_seconds`` 0: no limit."""
        self._socket = connection
        self._tls = tls
        self._authorization = authorization
        self._deadline = time.monotonic() + handshake_seconds if handshake_seconds else None
        self._secured = False
        self._quick = False
        """The client asked again as soon as it had its answers."""
        self.alone: Callable[[], bool] = lambda: False
        """Nobody else is served. Going to sleep and being woken takes longer than it takes a busy
        client to ask again, so it is waited for awake; but not at the expense of others."""

    # -- handshake -------------------------------------------------------------------------------

    def _limit(self) -> None:
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StorageError("The handshake takes too long", errno=errno.ETIMEDOUT)
        self._socket.settimeout(left)

    def send(self, data: bytes) -> None:
        self._limit()
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise _failure("write data", error) from None

    def receive(self, length: int, what: str) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while len(view):
            self._limit()
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise _failure(f"read {what}", error) from None
            if not count:
                raise StorageError(f"Failed to read {what}: {self._ended}")
            view = view[count:]
        return bytes(data)

    @property
    def _ended(self) -> str:
        if self._secured:
            return f"Cannot read from TLS channel: {ENDED}"
        return "Unexpected end-of-file before all data were read"

    def start_tls(self) -> None:
        from lamina.block.tls import peer_name, secure

        if self._tls is None:
            raise ProtocolError("TLS not configured")
        self._limit()
        self._socket = secured = secure(self._socket, self._tls, server=True)
        self._secured = True
        if self._authorization is not None:
            name = peer_name(secured)
            if not self._authorization.allows(name):
                raise StorageError(f"TLS x509 authz check for {name} is denied")

    # -- transmission ----------------------------------------------------------------------------

    def begin_transmission(self, patience: float) -> None:
        """No deadline any more; but a client that takes nothing for ``patience`` seconds is left
        (0: never)."""
        self._deadline = None
        self._socket.settimeout(None)
        if patience and hasattr(socket, "SO_SNDTIMEO"):
            interval = struct.pack("@ll", int(patience), int(patience % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def receive_into(self, buffers: list[memoryview]) -> int:
        """Bytes that came, waiting for at least one; 0: the client has closed the connection."""
        try:
            if len(buffers) > 1 and not self._secured:
                return self._socket.recvmsg_into(buffers)[0]
            receive, buffer = self._socket.recv_into, buffers[0]
            if self._secured:
                return receive(buffer)
            if self._quick and self.alone():
                for _ in range(_GLANCES):
                    try:
                        return receive(buffer, 0, _NO_WAIT)
                    except BlockingIOError:
                        pass
            start = time.perf_counter()
            count = receive(buffer)
            self._quick = time.perf_counter() - start < _SOON
            return count
        except OSError as error:
            raise _failure("read request", error) from None

    def send_all(self, data: memoryview | bytes | bytearray, *, more: bool = False) -> None:
        """``more``: it goes on at once."""
        view = memoryview(data)
        flags = _MORE if more and not self._secured else 0
        try:
            sent = self._socket.send(view, flags)
            while sent < len(view):
                view = view[sent:]
                sent = self._socket.send(view, flags)
        except OSError as error:
            raise _failure("write reply", error) from None

    def send_from(self, node: Node, offset: int, length: int) -> int:
        """Bytes of storage that went out without passing through memory, maybe none."""
        if self._secured:
            return 0
        try:
            return node.send_to(self._socket.fileno(), offset, length)
        except OSError as error:
            if error.errno in _GONE:
                raise _failure("write reply", error) from None
            return 0

    # -- the end ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Whoever receives sees the end of what the client sends; replies still go out."""
        self._shut(socket.SHUT_RD)

    def abort(self) -> None:
        """Whoever receives or sends fails."""
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with suppress(OSError):  # it may be closed already
            # Not the method of a TLS socket, which would go on in the clear.
            socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        self._socket.close()


def _failure(action: str, error: OSError) -> StorageError:
    if error.errno in _STALLED and action == "write reply":
        text = "The client does not read"
    elif isinstance(error, TimeoutError):
        text = "The handshake takes too long"
    else:
        text = error.strerror or str(error)
    return StorageError(f"Failed to {action}: {text}", errno=error.errno)
