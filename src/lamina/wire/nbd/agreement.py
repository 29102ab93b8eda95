"""What the two sides know of an export, and what a handshake agrees on."""

from __future__ import annotations

import enum

from lamina.records import dataclass, field
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.messages import BlockSizes


class Style(enum.IntEnum):
    """How requests and replies of the transmission phase look; later ones include earlier ones."""

    SIMPLE = 0
    STRUCTURED = 1
    """Replies come in chunks: sparse reads, block status, messages with errors."""
    EXTENDED = 2
    """Structured, with 64-bit lengths in requests and replies."""


@dataclass(frozen=True)
class Description:
    """What a server says of one of its exports."""

    name: str = ""
    size: int = 0
    """Bytes."""
    flags: int = nbd.HAS_FLAGS
    """Transmission flags."""
    text: str = ""
    """For people."""
    sizes: BlockSizes = BlockSizes()
    contexts: tuple[str, ...] = ()
    """Names of the metadata contexts that there are."""
    sizes_told: bool = False
    """Clients: the server itself named ``sizes``; otherwise they are what is usual."""


@dataclass(frozen=True)
class Agreement:
    """The end of a handshake: both sides may enter the transmission phase."""

    export: Description
    style: Style = Style.SIMPLE
    contexts: dict[str, int] = field(default_factory=dict)
    """The metadata contexts that BLOCK_STATUS reports, name -> number in its replies."""
