"""Accepting connections, counting them, ending them."""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from lamina.block.session import log_warning
from lamina.block.sockets import prepare
from lamina.errors import UsageError
from lamina.exports.nbd.carrier import Carrier
from lamina.exports.nbd.connection import Connection
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    import ssl

    from lamina.block.tls import Authorization
    from lamina.exports.nbd.export import Export

_MOST_HANDSHAKES = 128
"""At a time: of more, the oldest are given up, so that nobody can keep the others out."""
_PAUSE = 0.2
"""Seconds to wait before accepting again when the host has no descriptor or thread left."""


@dataclass(frozen=True)
class Limits:
    connections: int = 100
    """At a time; further ones wait to be accepted. 0: any number."""
    handshake_seconds: float = 10
    """A handshake that is not over by then is given up. 0: it may take for ever."""
    send_seconds: float = 120
    """A client that takes nothing of its answers for so long is left. 0: never."""


class Server:
    """Any number of exports, sockets and connections. Close it, or use it as a context manager."""

    def __init__(
        self,
        *,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        tls: ssl.SSLContext | None = None,
        authorization: Authorization | None = None,
        log: Callable[[str], None] = log_warning,
        on_end: Callable[[bool], None] = lambda served: None,
    ) -> None:
        """With ``tls`` nothing is served in the clear. ``on_end`` is called after a connection has
        ended, in a thread of its own; ``served``: it had chosen an export."""
        self.log = log
        self._limits = limits
        self._tls = tls
        self._authorization = authorization
        self._on_end = on_end
        self._exports: list[Export] = []
        self._connections: list[Connection] = []
        """Oldest first."""
        self._guard = threading.Lock()
        self._listening: list[socket.socket] = []
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._closing = False
        self._acceptor: threading.Thread | None = None

    # -- exports ---------------------------------------------------------------------------------

    def exports(self) -> list[Export]:
        return self._exports

    def add_export(self, export: Export) -> None:
        """Raises UsageError if there is one of that name."""
        with self._guard:
            if any(one.name == export.name for one in self._exports):
                raise UsageError(f"NBD server already has export named '{export.name}'")
            self._exports = [*self._exports, export]

    def remove_export(self, export: Export, *, seconds: float = 10) -> None:
        """Its connections finish what they are doing, within ``seconds``, and are ended."""
        with self._guard:
            self._exports = [one for one in self._exports if one is not export]
            using = [one for one in self._connections if one.export is export]
        _end(using, seconds)

    # -- connections -----------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many there are now, handshakes included."""
        return len(self._connections)

    def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on sockets that are listening, in a thread of its own. They belong to us now."""
        self._listening = list(sockets)
        for one in sockets:
            one.setblocking(False)
        self._acceptor = threading.Thread(target=self._accept, name="nbd acceptor", daemon=True)
        self._acceptor.start()

    def serve(self, connection: socket.socket) -> None:
        """Take over a connected socket. Raises OSError."""
        connection.setblocking(True)
        prepare(connection)
        carrier = Carrier(
            connection,
            tls=self._tls,
            authorization=self._authorization,
            handshake_seconds=self._limits.handshake_seconds,
        )
        one = Connection(
            carrier, self, tls=self._tls is not None, patience=self._limits.send_seconds
        )
        with self._guard:
            if self._closing:
                carrier.close()
                return
            try:
                one.start()
            except RuntimeError:
                carrier.close()
                raise OSError("The host has no more threads") from None
            self._connections.append(one)
            crowd = [
                other
                for other in self._connections
                if other.in_handshake and not other.stopping
            ]
        if len(crowd) > _MOST_HANDSHAKES:
            self.log("Too many handshakes at a time: giving up the oldest")
            crowd[0].abort()

    def ended(self, connection: Connection) -> None:
        with self._guard:
            if connection in self._connections:
                self._connections.remove(connection)
        self._wake()
        self._on_end(connection.export is not None)

    def _wake(self) -> None:
        with self._guard:
            if self._wake_write >= 0:
                with suppress(BlockingIOError):  # full: the acceptor wakes up anyway
                    os.write(self._wake_write, b"x")

    def _has_room(self) -> bool:
        most = self._limits.connections
        return not most or len(self._connections) < most

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            watching = False
            while not self._closing:
                if watching != self._has_room():
                    watching = not watching
                    for one in self._listening:
                        if watching:
                            selector.register(one, selectors.EVENT_READ)
                        else:
                            selector.unregister(one)
                for key, _ in selector.select():
                    if key.fileobj == self._wake_read:
                        os.read(self._wake_read, 4096)
                    elif isinstance(key.fileobj, socket.socket) and self._has_room():
                        self._accept_one(key.fileobj)

    def _accept_one(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            self._complain(error)
            return
        try:
            self.serve(connection)
        except OSError as error:
            connection.close()
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """No descriptor or thread is left: others have to go first."""
        self.log(f"Failed to accept a connection: {error.strerror or error}")
        threading.Event().wait(_PAUSE)

    # -- the end ---------------------------------------------------------------------------------

    def close(self, *, seconds: float = 10) -> None:
        """Accept nobody any more; whoever is connected has ``seconds`` to be served what it has
        asked for. What was written is flushed."""
        with self._guard:
            if self._closing:
                return
            self._closing = True
            connections = list(self._connections)
        self._wake()
        if self._acceptor is not None:
            self._acceptor.join()
        for one in self._listening:
            one.close()
        _end(connections, seconds)
        with self._guard:
            # A connection that is stuck may end later: it must not write to another's descriptor.
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1
        for export in self._exports:
            if not export.read_only:
                export.backend.flush()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(connections: list[Connection], seconds: float) -> None:
    for one in connections:
        one.stop()
    for one in connections:
        if not one.join(seconds):
            one.abort()
            one.join(seconds)
