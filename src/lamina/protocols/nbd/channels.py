"""What carries bytes to a server and back: a socket, plain or under TLS.

One thread may send while another receives. Sending never blocks, so that whoever sends can receive
instead while the server does not listen because it is sending itself.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from lamina.errors import ImageUnsupported, StorageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

Buffers = Sequence["memoryview | bytes | bytearray"]

_MOST_BUFFERS = 1000
"""Of one call; hosts take 1024."""
_TLS_PIECE = 64 << 10
"""Bytes that are given to the TLS library at a time."""


class PlainChannel:
    def __init__(self, connection: socket.socket) -> None:
        """Raises ImageUnsupported where the host cannot send without waiting."""
        if not hasattr(socket, "MSG_DONTWAIT") or not hasattr(select, "poll"):
            raise ImageUnsupported("NBD is not supported on this system")
        self._socket = connection
        self._poll_in = self._polled(select.POLLIN)
        self._poll_out = self._polled(select.POLLOUT)
        self._poll_both = self._polled(select.POLLIN | select.POLLOUT)

    def _polled(self, events: int) -> select.poll:
        poll = select.poll()
        poll.register(self._socket.fileno(), events)
        return poll

    def send(self, buffers: Buffers) -> int:
        """Bytes that were taken; 0: none now. Raises OSError."""
        try:
            return self._socket.sendmsg(buffers[:_MOST_BUFFERS], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive(self, buffers: list[memoryview]) -> int:
        """Bytes that came, at least one: waits for them. Raises OSError."""
        if len(buffers) == 1:
            count = self._socket.recv_into(buffers[0])
        else:
            count = self._socket.recvmsg_into(buffers)[0]
        if not count:
            raise ended()
        return count

    def wait_to_send(self, seconds: float) -> None:
        self._poll_out.poll(seconds * 1000)

    def wait_for_either(self) -> bool:
        """Until something can be sent or received; whether it can be received."""
        return any(events & ~select.POLLOUT for _, events in self._poll_both.poll())

    def interrupt(self) -> None:
        """Whoever waits for this channel stops waiting."""
        with suppress(OSError):  # it may be down already
            # Not the method of a TLS socket, which would go on in the clear.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsChannel(PlainChannel):
    """The library wants one call at a time on a connection, so none may block."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        super().__init__(connection)
        connection.setblocking(False)
        self._secured = connection
        self._turn = threading.Lock()

    def send(self, buffers: Buffers) -> int:
        import ssl

        # After a refusal the library wants to see the same bytes again: it does, as they are
        # still the first of those to be sent.
        piece = bytearray()
        for buffer in buffers:
            piece += memoryview(buffer)[: _TLS_PIECE - len(piece)]
            if len(piece) == _TLS_PIECE:
                break
        try:
            with self._turn:
                return self._secured.send(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def receive(self, buffers: list[memoryview]) -> int:
        import ssl

        while True:
            try:
                with self._turn:
                    count = self._secured.recv_into(buffers[0])
            except ssl.SSLWantReadError:
                self._poll_in.poll()
            except ssl.SSLWantWriteError:
                self._poll_out.poll()
            else:
                if not count:
                    raise ended()
                return count

    def wait_for_either(self) -> bool:
        with self._turn:
            if self._secured.pending():
                return True
        return super().wait_for_either()


def ended() -> StorageError:
    return StorageError(
        "Unexpected end-of-file before all data were read", errno=errno.EIO
    )
