"""All connections of a node: as many as pay, and new ones for those that are lost."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence

from lamina.block.session import log_warning
from lamina.errors import LaminaError, StorageError, UsageError
from lamina.protocols.nbd.connecting import Connector
from lamina.protocols.nbd.link import Link, LinkBroken
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.transmission_client import Request

_MOST = 4
"""Connections that several threads spread over, where the server keeps them consistent."""
_HANDSHAKE = 10.0
"""Seconds that a further connection may take, or one that replaces another."""
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 16.0
"""Seconds between attempts to connect again; each is twice the one before."""
_OPEN_PAUSE = 0.1
"""Seconds between attempts to connect for the first time."""


_MAY_GO = nbd.READ_ONLY | nbd.ROTATIONAL | nbd.CAN_MULTI_CONN
"""Flags of an export that may be missing when it comes back."""


class Connections:
    def __init__(
        self,
        connector: Connector,
        *,
        reconnect_delay: int,
        open_timeout: int,
        warn: Callable[[str], None] = log_warning,
    ) -> None:
        """Connects; tries again for ``open_timeout`` seconds. Raises what connecting raised."""
        self._warn = warn
        self._connector = connector
        self._delay = reconnect_delay
        first = _connect_patiently(connector, open_timeout)
        self.agreement = first.agreement
        self._last_size = first.agreement.export.size
        self._links = [first]
        self._guard = threading.Lock()
        """Of the fields; never held while waiting for the network."""
        self._reconnecting = threading.Lock()
        self._shared = bool(self.agreement.export.flags & nbd.CAN_MULTI_CONN)
        self._adding = False
        self._lost_at = 0.0
        self._next_attempt = 0.0
        self._pause = _FIRST_PAUSE
        self._closed = threading.Event()

    def run(self, requests: Sequence[Request]) -> None:
        """Until all are answered; what was in flight when a connection broke is sent again.

        Raises StorageError (EIO) if there is no connection, or none comes in time.
        """
        while requests:
            link = self._link()
            try:
                link.execute(requests)
                return
            except LinkBroken:
                self._forget(link)
                requests = [request for request in requests if not request.answered]
                for request in requests:
                    request.reset()
                if not self._delay and requests:
                    raise StorageError.from_errno(errno.EIO) from None

    # -- which connection ------------------------------------------------------------------------

    def _link(self) -> Link:
        links = self._links
        if len(links) == 1 and (not self._shared or not links[0].in_flight):
            return links[0]  # nearly always
        with self._guard:
            if self._links:
                best = min(self._links, key=lambda link: link.in_flight)
                wanted = best.in_flight and self._shared and len(self._links) < _MOST
                if wanted and not self._adding:
                    self._adding = True
                    threading.Thread(target=self._add, daemon=True).start()
                return best
        return self._reconnect()

    def _add(self) -> None:
        """One more connection; the others serve meanwhile. A server that does not want is left
        alone from then on."""
        try:
            link = self._connector.connect(_HANDSHAKE)
        except LaminaError:
            self._shared = False
            return
        with self._guard:
            if not self._closed.is_set() and self._same_disk(link):
                self._links = [*self._links, link]
                self._adding = False
                return
        link.close()

    def _same_disk(self, link: Link) -> bool:
        """Whether everything that was agreed on still holds; there may be more than before."""
        old, new = self.agreement, link.agreement
        return (
            old.style == new.style
            and old.contexts == new.contexts
            and old.export.size <= new.export.size
            and not old.export.flags & ~new.export.flags & ~_MAY_GO
            and not new.export.flags & ~old.export.flags & nbd.READ_ONLY
            and old.export.sizes == new.export.sizes
        )

    # -- broken ones -----------------------------------------------------------------------------

    def _forget(self, link: Link) -> None:
        with self._guard:
            if link in self._links:
                self._links = [one for one in self._links if one is not link]
                if not self._links:
                    self._lost_at = self._next_attempt = time.monotonic()
                    self._pause = _FIRST_PAUSE

    def _reconnect(self) -> Link:
        """A new connection in the place of the last one. Raises StorageError (EIO)."""
        with self._reconnecting:
            while True:
                if self._links:  # another thread was quicker
                    return self._links[0]
                now = time.monotonic()
                waits_until = self._lost_at + self._delay
                if self._closed.is_set() or (now < self._next_attempt and now >= waits_until):
                    raise StorageError.from_errno(errno.EIO)
                if now < self._next_attempt:
                    self._closed.wait(min(self._next_attempt, waits_until) - now)
                    continue
                link = self._attempt(waits_until)
                if link is not None:
                    return link

    def _attempt(self, waits_until: float) -> Link | None:
        limit = max(waits_until - time.monotonic(), 1.0)
        try:
            link = self._connector.connect(min(limit, _HANDSHAKE))
        except LaminaError:
            link = None
        if link is not None:
            self._notice_size(link.agreement.export.size)
            if not self._same_disk(link):
                link.close()
                link = None
        if link is None:
            self._next_attempt = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            return None
        self._shared = bool(link.agreement.export.flags & nbd.CAN_MULTI_CONN)
        with self._guard:
            self._links = [link]
        return link

    def _notice_size(self, size: int) -> None:
        """Tell, once, that the export has another size than before."""
        if size == self._last_size:
            return
        self._last_size = size
        export = self.agreement.export
        if size == export.size:
            return
        then = (
            "the disk is as long as before until it is opened again"
            if size > export.size
            else "it is not used until it is as long as before"
        )
        self._warn(
            f"NBD export '{export.name}' has {size} bytes instead of {export.size}: {then}"
        )

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        self._closed.set()
        with self._guard:
            links, self._links = self._links, []
        for link in links:
            link.close()


def _connect_patiently(connector: Connector, seconds: int) -> Link:
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = deadline - time.monotonic()
            return connector.connect(max(left, 0.1) if seconds else None)
        except UsageError:
            raise
        except LaminaError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
        time.sleep(min(_OPEN_PAUSE, left))
