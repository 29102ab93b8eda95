"""One connection in the transmission phase, for any number of threads at once.

Nobody receives on behalf of the others all the time: a thread that waits for its replies receives,
if no other thread does, and hands out what is not its own; when it has what it waited for, another
one goes on. So one thread alone never waits for a second one, and many share the connection.

A server that is sending may not listen, and whoever only sends to it would wait for ever. Sending
therefore never blocks: while nothing can be sent, the sender receives.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import suppress

from lamina.errors import LaminaError, StorageError
from lamina.protocols.nbd.channels import PlainChannel
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Agreement, Style
from lamina.wire.nbd.transmission_client import ReplyReader, Request, pack_request

_PATIENCE = 0.05
"""Seconds that a sender waits before it looks whether it has to receive itself."""


class LinkBroken(StorageError):
    """The connection is gone; requests may or may not have been carried out."""


class _Batch:
    """Requests that one thread waits for."""

    __slots__ = ("left",)

    def __init__(self, count: int) -> None:
        self.left = count


class Link:
    def __init__(self, channel: PlainChannel, agreement: Agreement) -> None:
        self.agreement = agreement
        self.broken: LaminaError | None = None
        self._channel = channel
        self._extended = agreement.style is Style.EXTENDED
        self._pending: dict[int, Request] = {}
        self._reader = ReplyReader(
            agreement.style, self._pending, set(agreement.contexts.values())
        )
        self._cookies = itertools.count(1)
        self._sending = threading.Lock()
        self._turn = threading.Condition(threading.Lock())
        """Guards what follows; whoever finishes a batch of others, or stops, notifies."""
        self._receiving = False
        self._users = 0
        """Threads inside of ``execute``; the last one closes a broken connection."""

    @property
    def in_flight(self) -> int:
        """Requests that have been sent and not answered."""
        return len(self._pending)

    def execute(self, requests: Sequence[Request]) -> None:
        """Send them and wait for all replies. Raises LinkBroken; ``answered`` says for which
        requests there was a reply before."""
        batch = _Batch(len(requests))
        with self._turn:
            if self.broken is not None:
                raise LinkBroken(str(self.broken), errno=5)
            self._users += 1
        try:
            with self._sending:
                self._send(requests, batch)
            self._wait(batch)
        except (OSError, LaminaError) as error:
            raise self._break(error) from None
        finally:
            with self._turn:
                self._users -= 1
                if self.broken is not None and not self._users:
                    self._channel.close()

    # -- sending ---------------------------------------------------------------------------------

    def _send(self, requests: Sequence[Request], batch: _Batch) -> None:
        buffers: list[memoryview | bytes | bytearray] = []
        for request in requests:
            request.cookie = next(self._cookies)
            request.owner = batch
            buffers.append(pack_request(request, extended=self._extended))
            if request.command == nbd.CMD_WRITE and request.buffer is not None:
                buffers.append(request.buffer)
        if self.broken is not None:
            raise self.broken
        for request in requests:
            self._pending[request.cookie] = request
        while buffers:
            sent = self._channel.send(buffers)
            if not sent:
                self._receive_meanwhile()
                continue
            for done, buffer in enumerate(buffers):
                if sent < len(buffer):
                    buffers[: done + 1] = [memoryview(buffer)[sent:]]
                    break
                sent -= len(buffer)
            else:
                buffers = []

    def _receive_meanwhile(self) -> None:
        """Nothing can be sent now."""
        with self._turn:
            if self.broken is not None:
                raise self.broken
            if self._receiving:
                mine = False
            else:
                mine = self._receiving = True
        if not mine:
            self._channel.wait_to_send(_PATIENCE)
            return
        try:
            if self._channel.wait_for_either():
                self._receive()
        finally:
            self._stop_receiving()

    # -- receiving -------------------------------------------------------------------------------

    def _wait(self, batch: _Batch) -> None:
        while batch.left:
            with self._turn:
                while self._receiving and batch.left and self.broken is None:
                    self._turn.wait()
                if not batch.left:
                    return
                if self.broken is not None:
                    raise self.broken
                self._receiving = True
            try:
                while batch.left:
                    self._receive(batch)
            finally:
                self._stop_receiving()

    def _stop_receiving(self) -> None:
        with self._turn:
            self._receiving = False
            self._turn.notify_all()

    def _receive(self, own: _Batch | None = None) -> None:
        """Take in what has come; waits for at least a byte. Only for whoever has the turn."""
        count = self._channel.receive(self._reader.buffers())
        others = False
        for request in self._reader.received(count):
            batch = request.owner
            request.owner = None
            if isinstance(batch, _Batch):
                batch.left -= 1
                others |= not batch.left and batch is not own
        if others:
            with self._turn:
                self._turn.notify_all()

    # -- the end ---------------------------------------------------------------------------------

    def _break(self, error: OSError | LaminaError) -> LinkBroken:
        if isinstance(error, OSError):
            error = StorageError.from_os_error(error)
        with self._turn:
            if self.broken is None:
                self.broken = error
            self._turn.notify_all()
        self._channel.interrupt()
        with self._turn:
            # Whoever is still receiving may be filling a buffer of ours.
            while self._receiving:
                self._turn.wait()
        return LinkBroken(str(error), errno=5)

    def close(self) -> None:
        """Say goodbye and go. Nobody may be using the link."""
        with self._sending:
            if self.broken is None:
                goodbye = pack_request(Request(nbd.CMD_DISC), extended=self._extended)
                with suppress(OSError):  # it may be gone already
                    self._channel.send([goodbye])
                self._break(StorageError("the connection is closed"))
        if not self._users:
            self._channel.close()
