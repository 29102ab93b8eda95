"""Creating images: options settled first, then the file, then what the format writes into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.node import Node
    from lamina.block.secrets import Secrets
    from lamina.block.session import Session

_BACKING_FILE, _BACKING_FORMAT, _SIZE = "backing_file", "backing_fmt", "size"
_MAX_SIZE = (1 << 63) - 1


class Creation:
    """An image about to be created: everything is settled and checked, nothing is written.

    ``format_options`` and ``protocol_options`` are instances of the drivers' ``CreateOptions``.
    """

    def __init__(
        self,
        filename: str,
        format_driver: Driver,
        protocol_driver: Driver,
        given: dict[str, Any],
        session: Session,
    ) -> None:
        self.filename = filename
        self.session = session
        self.format_driver = format_driver
        self.protocol_driver = protocol_driver
        self._given = given
        self._backing: Node | None = None

    @property
    def secrets(self) -> Secrets:
        return self.session.secrets
