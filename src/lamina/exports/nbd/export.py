"""One disk under a name."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.permissions import Perm
from lamina.exports.nbd.contexts import AllocationContext, Context
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_down
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd.agreement import Description
from lamina.wire.nbd.messages import BlockSizes

if TYPE_CHECKING:
    from lamina.block.backend import Backend

_READ_FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_CACHE
_WRITE_FLAGS = nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO


class Export:
    """All connections go through one ``backend``: what one of them wrote the others read, and a
    flush by any of them is a flush of all. So several connections may share the work."""

    def __init__(
        self,
        backend: Backend,
        *,
        name: str = "",
        text: str = "",
        read_only: bool = False,
        multi_conn: bool = True,
        contexts: Sequence[Context] = (),
    ) -> None:
        """``text`` describes it to people; ``multi_conn`` tells clients that they may connect
        several times; ``contexts`` come after ``base:allocation``. Raises Busy where somebody may
        change the size of the disk."""
        backend.unshare(Perm.RESIZE)  # clients are told the size once
        self.backend = backend
        self.read_only = read_only or backend.read_only
        block = _block_size(backend)
        self.contexts: list[Context] = [AllocationContext(backend.node, block), *contexts]
        flags = _READ_FLAGS
        if self.read_only:
            flags |= nbd.READ_ONLY
        else:
            flags |= _WRITE_FLAGS
        if multi_conn:
            flags |= nbd.CAN_MULTI_CONN
        self.size = round_down(backend.size, SECTOR)
        self.description = Description(
            name,
            self.size,
            flags,
            text,
            BlockSizes(block, max(4096, block), nbd.MAX_PAYLOAD),
            tuple(context.name for context in self.contexts),
        )

    @property
    def name(self) -> str:
        return self.description.name


def _block_size(backend: Backend) -> int:
    """What clients are told to align to, though none has to: bytes that are cheap to access."""
    below = backend.node.unfiltered
    if below.driver == "raw" and below.options.probed:
        return max(SECTOR, backend.limits.request_alignment)  # block 0 is looked at when written
    return backend.limits.request_alignment
