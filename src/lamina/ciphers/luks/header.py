"""The header of a LUKS1 volume (LUKS On-Disk Format 1.x, figures 1 and 2). Big-endian."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from lamina.ciphers.luks.keys import STRIPES
from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.units import SECTOR, round_up

MAGIC = b"LUKS\xba\xbe"
SLOTS = 8
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
SIZE = _HEADER.size + SLOTS * _SLOT.size
"""592 bytes."""
ACTIVE = 0x00AC71F3
INACTIVE = 0x0000DEAD
FIRST_SLOT_OFFSET = 4096
SLOT_ALIGNMENT = 4096


@dataclass
class KeySlot:
    """One passphrase's way to the master key."""

    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(32)
    offset: int = 0
    """Bytes from the header to the key material."""
    stripes: int = STRIPES


@dataclass
class Header:
    cipher: str
    """``aes``: without its key size, which ``key_bytes`` implies."""
    mode: str
    """``xts-plain64``, ``cbc-essiv:sha256``, ``ecb``."""
    hash: str
    payload_offset: int
    """Bytes from the header to the first encrypted sector; 0: the header is detached."""
    key_bytes: int
    digest: bytes = bytes(20)
    digest_salt: bytes = bytes(32)
    digest_iterations: int = 0
    uuid: str = ""
    slots: list[KeySlot] = field(default_factory=lambda: [KeySlot() for _ in range(SLOTS)])

    @property
    def material_bytes(self) -> int:
        """What a key slot's split key takes."""
        return self.key_bytes * STRIPES

    @property
    def slots_end(self) -> int:
        """Bytes from the header to where the last key slot's material ends, as QEMU aligns it."""
        area = round_up(self.material_bytes, SLOT_ALIGNMENT)
        return max(slot.offset for slot in self.slots) + area

    def place_slots(self, *, detached: bool = False) -> None:
        """Lay the key slots out as QEMU does, and the payload behind them."""
        area = round_up(self.material_bytes, SLOT_ALIGNMENT)
        for number, slot in enumerate(self.slots):
            slot.offset = FIRST_SLOT_OFFSET + number * area
        self.payload_offset = 0 if detached else self.slots_end

    def pack(self) -> bytes:
        head = _HEADER.pack(
            MAGIC,
            1,
            self.cipher.encode(),
            self.mode.encode(),
            self.hash.encode(),
            self.payload_offset // SECTOR,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        return head + b"".join(
            _SLOT.pack(
                ACTIVE if slot.active else INACTIVE,
                slot.iterations,
                slot.salt,
                slot.offset // SECTOR,
                slot.stripes,
            )
            for slot in self.slots
        )


def parse(data: bytes, *, detached: bool = False) -> Header:
    """Raises ImageCorrupt or ImageUnsupported, naming the field."""
    if len(data) < SIZE or data[:6] != MAGIC:
        raise _corrupt("Volume is not in LUKS format", "magic", 0)
    (_, version, cipher, mode, hash_spec, payload, key_bytes, digest, salt, iterations, uuid) = (
        _HEADER.unpack_from(data)
    )
    if version != 1:
        raise ImageUnsupported(
            f"LUKS version {version} is not supported", format="luks", field="version", offset=6
        )
    header = Header(
        cipher=_text(cipher, "cipher name", 8),
        mode=_text(mode, "cipher mode", 40),
        hash=_text(hash_spec, "hash spec", 72),
        payload_offset=payload * SECTOR,
        key_bytes=key_bytes,
        digest=digest,
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=uuid.split(b"\0")[0].decode("ascii", "replace"),
        slots=[_parse_slot(data, number) for number in range(SLOTS)],
    )
    if iterations == 0:
        raise _corrupt("LUKS key iteration count is zero", "mk-digest-iter", 164)
    _check_places(header, detached)
    return header


def _parse_slot(data: bytes, number: int) -> KeySlot:
    at = _HEADER.size + number * _SLOT.size
    state, iterations, salt, offset, stripes = _SLOT.unpack_from(data, at)
    if stripes != STRIPES:
        raise _corrupt(
            f"Keyslot {number} is corrupted (stripes {stripes} != {STRIPES})", "stripes", at + 44
        )
    if state not in (ACTIVE, INACTIVE):
        raise _corrupt(f"Keyslot {number} state (active/disable) is corrupted", "active", at)
    if state == ACTIVE and iterations == 0:
        raise _corrupt(f"Keyslot {number} iteration count is zero", "iterations", at + 4)
    return KeySlot(state == ACTIVE, iterations, salt, offset * SECTOR, stripes)


def _check_places(header: Header, detached: bool) -> None:
    """Key slots lie behind the header, before the payload, and apart from each other."""
    if not detached and header.payload_offset < round_up(SIZE, SECTOR):
        raise _corrupt("LUKS payload is overlapping with the header", "payload-offset", 104)
    area = round_up(header.material_bytes, SECTOR)
    for number, slot in enumerate(header.slots):
        at = _HEADER.size + number * _SLOT.size + 40
        if slot.offset < round_up(SIZE, SECTOR):
            raise _corrupt(
                f"Keyslot {number} is overlapping with the LUKS header", "key-material-offset", at
            )
        if not detached and slot.offset + area > header.payload_offset:
            raise _corrupt(
                f"Keyslot {number} is overlapping with the encrypted payload",
                "key-material-offset",
                at,
            )
        for other, earlier in enumerate(header.slots[:number]):
            if abs(slot.offset - earlier.offset) < area:
                raise _corrupt(
                    f"Keyslots {other} and {number} are overlapping in the header",
                    "key-material-offset",
                    at,
                )


def _text(field_bytes: bytes, name: str, offset: int) -> str:
    text, end, _ = field_bytes.partition(b"\0")
    if not end:
        raise _corrupt(f"LUKS header {name} is not NUL terminated", name, offset)
    return text.decode("ascii", "replace")


def _corrupt(message: str, field_name: str, offset: int) -> ImageCorrupt:
    return ImageCorrupt(
        message, format="luks", structure="header", field=field_name, offset=offset
    )
