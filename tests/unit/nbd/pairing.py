"""Two machines that talk to each other in memory, or one that listens to bytes made up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Description
from lamina.wire.nbd.steps import Negotiation, Receive, Send, Skip, StartTls


class Catalogue:
    """Exports by name."""

    def __init__(self, *exports: Description) -> None:
        self._exports = {export.name: export for export in exports}

    def listed(self) -> Iterable[Description]:
        return self._exports.values()

    def find(self, name: str) -> Description | None:
        return self._exports.get(name)


class Ended(Exception):
    """The peer has nothing more to say."""


class Side:
    """A negotiation, the bytes it was sent and has not read, and how it ended."""

    def __init__(self, negotiation: Negotiation[Any]) -> None:
        self.negotiation = negotiation
        self.inbox = bytearray()
        self.sent = bytearray()
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False
        self.secured = False
        self._step: Any = None
        self._advance(b"")

    def _advance(self, answer: bytes) -> None:
        try:
            self._step = self.negotiation.send(answer) if answer else next(self.negotiation)
        except StopIteration as end:
            self.result, self.done = end.value, True
        except Exception as error:
            self.error, self.done = error, True

    def go_on(self) -> bytes:
        """As far as the inbox reaches; what was sent meanwhile."""
        out = bytearray()
        while not self.done:
            step = self._step
            if isinstance(step, Send):
                out += step.data
                self._advance(b"")
            elif isinstance(step, StartTls):
                self.secured = True
                self._advance(b"")
            else:
                assert isinstance(step, Receive | Skip)
                if len(self.inbox) < step.length:
                    break
                taken = bytes(self.inbox[: step.length])
                del self.inbox[: step.length]
                self._advance(taken if isinstance(step, Receive) else b"")
        self.sent += out
        return bytes(out)


def converse(client: Negotiation[Any], server: Negotiation[Any]) -> tuple[Side, Side]:
    """Until neither has anything more to say."""
    one, other = Side(client), Side(server)
    while True:
        to_client, to_server = other.go_on(), one.go_on()
        one.inbox += to_client
        other.inbox += to_server
        if not to_client and not to_server:
            return one, other


def listen(negotiation: Negotiation[Any], data: bytes) -> Side:
    """One side, and a peer that says ``data`` whatever it hears, and ends there."""
    side = Side(negotiation)
    side.inbox += data
    side.go_on()
    return side


def replies_in(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, type, data) of the option replies in what a server sent after its greeting."""
    found = []
    at = messages.GREETING.size
    while at < len(data):
        _, option, kind, length = messages.OPTION_REPLY.unpack_from(data, at)
        at += messages.OPTION_REPLY.size
        found.append((option, kind, data[at : at + length]))
        at += length
    return found
