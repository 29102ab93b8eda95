"""Where the sectors of a LUKS volume are: behind the header, encrypted, one for one."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation
from lamina.ciphers.luks.amend import Change, amend
from lamina.ciphers.luks.describe import describe
from lamina.ciphers.luks.header import SIZE, Header, parse
from lamina.ciphers.luks.volume import CipherSpec, unlock
from lamina.engine.mapping import InPlace, Mapping, Piece, Reservation
from lamina.engine.metadata import Metadata
from lamina.errors import ImageCorrupt, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.node import Node
    from lamina.block.secrets import Secrets
    from lamina.ciphers.modes import SectorCipher
    from lamina.engine.disk import Disk
    from lamina.formats.luks.options import LuksAmendOptions, LuksOptions


class LuksMapping(Mapping):
    """Sector ``n`` of the disk is sector ``n`` of the payload, which is also its tweak."""

    driver = "luks"
    unit = SECTOR
    request_alignment = SECTOR

    def __init__(self, disk: Disk, options: LuksOptions, context: OpenContext) -> None:
        self.disk = disk
        self.file: Node = disk.file
        self.metadata = Metadata(disk.file)
        detached = any(key.partition(".")[0] == "header" for key in context.image_option)
        self.header_node: Node = disk.file
        if detached:
            self.header_node = context.open_child("header")
            disk.attach("header", self.header_node)
        self.detached = detached
        self.header: Header = parse(_read(self.header_node, 0, SIZE), detached=detached)
        CipherSpec.of(self.header)
        self._check_payload()
        self.cipher: SectorCipher | None = None
        self.key = b""
        if not context.locked:
            self.cipher = self._unlock(options, context)

    def _check_payload(self) -> None:
        if self.header.payload_offset > self.file.size:
            raise ImageCorrupt(
                "Could not refresh total sector count: Input/output error",
                format="luks",
                structure="header",
                field="payload-offset",
                offset=104,
            )

    def _unlock(self, options: LuksOptions, context: OpenContext) -> SectorCipher:
        passphrase = context.secrets.require(options.key_secret, "key-secret")
        self.key, _ = unlock(self.header, passphrase, HeaderStorage(self.header_node).read)
        return CipherSpec.of(self.header).sectors(self.key)

    @property
    def size(self) -> int:  # type: ignore[override]
        """What lies behind the payload offset."""
        return max(self.file.size - self.header.payload_offset, 0)

    def resolve(self, offset: int, length: int) -> list[Extent]:
        return [
            Extent(
                offset,
                length,
                Kind.DATA,
                self.file,
                self.header.payload_offset + offset,
                cipher=self.cipher,
                first_sector=offset // SECTOR,
            )
        ]

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        base = self.header.payload_offset
        return InPlace(
            [
                Piece(
                    offset,
                    length,
                    self.file,
                    base + offset,
                    cipher=self.cipher,
                    first_sector=offset // SECTOR,
                )
                for offset, length in ranges
            ]
        )

    def truncate(
        self, size: int, preallocation: Preallocation, *, exact: bool, zeroed: bool
    ) -> None:
        """New space holds whatever zeroes decrypt to, as it does in QEMU."""
        total = self.header.payload_offset + size
        if total > (1 << 63) - 1:
            raise UsageError("The requested file size is too large")
        self.file.truncate(total, preallocation, exact=exact, zeroed=zeroed)

    def amend(self, options: LuksAmendOptions, secrets: Secrets, *, force: bool) -> None:
        """Add a passphrase, or erase some. Raises UsageError or Refused."""
        change = Change.of(
            options.state,
            options.new_secret,
            options.old_secret,
            options.keyslot,
            options.iter_time,
            look_up=secrets.lookup,
        )
        amend(self.header, HeaderStorage(self.header_node), self.key, change, force=force)

    def info(self) -> NodeInfo:
        return NodeInfo(
            self.disk.filename,
            "luks",
            self.size,
            self.file.info().actual_size,
            encrypted=True,
            specific=describe(self.header, detached=self.detached),
        )


class HeaderStorage:
    """The header and its key slots (``ciphers.luks``)."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def read(self, offset: int, length: int) -> bytes:
        return _read(self._node, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._node.write(offset, data)

    def flush(self) -> None:
        self._node.flush()


def _read(node: Node, offset: int, length: int) -> bytes:
    """What there is of the range: a short file makes a short header, which ``parse`` refuses."""
    return node.read(offset, max(min(length, node.size - offset), 0))
