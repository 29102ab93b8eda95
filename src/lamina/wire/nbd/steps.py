"""What a handshake asks of whoever carries its bytes.

A negotiation is a generator: it yields steps and is sent the bytes that a ``Receive`` asked for
(nothing after other steps); its return value is what was agreed. It does no I/O, keeps no time and
never asks for more bytes than the limits of the protocol allow, whatever the peer announces.
"""

from __future__ import annotations

from collections.abc import Generator

from lamina.errors import StorageError
from lamina.hints import NamedTuple, Protocol, TypeAlias, TypeVar

T = TypeVar("T")


class ProtocolError(StorageError):
    """The peer broke the rules of the protocol: there is nothing more to say to it."""


class Send(NamedTuple):
    data: bytes
    last: bool = False
    """Nothing follows, and the peer may have left already."""


class Receive(NamedTuple):
    """Exactly so many bytes are wanted next."""

    length: int
    what: str
    """As messages call them, should they not come: ``initial magic``."""


class Skip(NamedTuple):
    """So many bytes are to be received and thrown away."""

    length: int
    what: str


class StartTls(NamedTuple):
    """Both sides have agreed: from the next byte on it is TLS."""


Step: TypeAlias = Send | Receive | Skip | StartTls
Negotiation: TypeAlias = Generator[Step, bytes, T]


class Carrier(Protocol):
    """Blocking; what its methods raise ends the negotiation."""

    def send(self, data: bytes) -> None: ...

    def receive(self, length: int, what: str) -> bytes:
        """Raises where the peer ends the connection before."""

    def start_tls(self) -> None: ...


def run(negotiation: Negotiation[T], carrier: Carrier) -> T:
    """Carry out the steps of ``negotiation``; returns what was agreed."""
    answer = b""
    try:
        while True:
            step = negotiation.send(answer) if answer else next(negotiation)
            answer = b""
            if isinstance(step, Send):
                try:
                    carrier.send(step.data)
                except StorageError:
                    if not step.last:
                        raise
            elif isinstance(step, Receive):
                answer = carrier.receive(step.length, step.what) if step.length else b""
            elif isinstance(step, Skip):
                _skip(carrier, step)
            else:
                carrier.start_tls()
    except StopIteration as end:
        agreed: T = end.value
        return agreed
    finally:
        negotiation.close()


def receive(length: int, what: str) -> Negotiation[bytes]:
    """``yield from receive(…)``: the bytes, none if ``length`` is 0."""
    if not length:
        return b""
    return (yield Receive(length, what))


_PIECE = 1 << 16


def _skip(carrier: Carrier, step: Skip) -> None:
    left = step.length
    while left:
        left -= len(carrier.receive(min(left, _PIECE), step.what))
