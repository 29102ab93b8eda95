"""The life of one connection: handshake, transmission, end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from lamina.errors import LaminaError
from lamina.exports.nbd.serving import Transmission
from lamina.hints import TYPE_CHECKING, Protocol
from lamina.wire.nbd import steps
from lamina.wire.nbd.negotiation_server import negotiate

if TYPE_CHECKING:
    from lamina.exports.nbd.carrier import Carrier
    from lamina.exports.nbd.export import Export
    from lamina.wire.nbd.agreement import Agreement, Description


class Host(Protocol):
    """What a connection asks of its server."""

    @property
    def connections(self) -> int: ...

    def exports(self) -> list[Export]: ...

    def log(self, text: str) -> None: ...

    def ended(self, connection: Connection) -> None: ...


class Connection:
    def __init__(self, carrier: Carrier, host: Host, *, tls: bool, patience: float) -> None:
        """``patience``: seconds for which a client may leave its answers where they are."""
        self.in_handshake = True
        self.stopping = False
        self.export: Export | None = None
        """The one that was chosen."""
        self._carrier = carrier
        self._host = host
        self._tls = tls
        self._patience = patience
        self._thread = threading.Thread(target=self._run, name="nbd connection", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is being done, then leave; a handshake ends at once."""
        self.stopping = True
        if self.in_handshake:
            self._carrier.abort()
        else:
            self._carrier.wake()

    def abort(self) -> None:
        """Leave, whatever is being done."""
        self.stopping = True
        self._carrier.abort()

    def join(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            agreement = self._shake_hands()
            if agreement is not None:
                self._transmit(agreement)
        except MemoryError:
            self._say("Disconnect client, due to: not enough memory")
        finally:
            self.in_handshake = False
            self._carrier.close()
            self._host.ended(self)

    def _shake_hands(self) -> Agreement | None:
        try:
            return steps.run(negotiate(_Catalogue(self._host), tls=self._tls), self._carrier)
        except (LaminaError, OSError) as error:
            self._say(f"option negotiation failed: {error}")
            return None

    def _transmit(self, agreement: Agreement) -> None:
        self.export = _find(self._host, agreement.export.name)
        self.in_handshake = False
        if self.export is None:
            return  # it was taken away this very moment
        try:
            self._carrier.begin_transmission(self._patience)
            self._carrier.alone = lambda: self._host.connections == 1
            transmission = Transmission(self._carrier, self.export, agreement)
            transmission.run(lambda: self.stopping)
        except (LaminaError, OSError) as error:
            self._say(f"Disconnect client, due to: {error}")

    def _say(self, text: str) -> None:
        if not self.stopping:
            self._host.log(text)


class _Catalogue:
    """The exports as the handshake wants to see them."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def listed(self) -> Iterator[Description]:
        return (export.description for export in self._host.exports())

    def find(self, name: str) -> Description | None:
        export = _find(self._host, name)
        return None if export is None else export.description


def _find(host: Host, name: str) -> Export | None:
    return next((export for export in host.exports() if export.name == name), None)
