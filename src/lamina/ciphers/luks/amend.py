"""Adding and erasing the key slots of a LUKS1 volume."""

from __future__ import annotations

import os
from collections.abc import Callable

from lamina.ciphers.luks.create import slot_iterations
from lamina.ciphers.luks.header import SLOTS, Header, KeySlot
from lamina.ciphers.luks.volume import CipherSpec, fill_slot, key_of_slot
from lamina.errors import Refused, UsageError
from lamina.hints import Protocol
from lamina.records import dataclass
from lamina.units import SECTOR, round_up

OVERWRITES = 40
"""How often the material of an erased key slot is overwritten (LUKS On-Disk Format, 3.4)."""
DEFAULT_ITER_TIME = 2000
"""Milliseconds."""
_ALL_LOST = "which will erase all the data in the image irreversibly - refusing operation"


class Storage(Protocol):
    """Where a header lives; offsets are relative to it."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True)
class Change:
    """What to do with key slots, as users say it; passphrases instead of the names of secrets."""

    state: str
    """``active``: add a passphrase. ``inactive``: erase slots."""
    new_passphrase: bytes | None = None
    old_passphrase: bytes | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    """Milliseconds."""

    @classmethod
    def of(
        cls,
        state: str | None,
        new_secret: str | None,
        old_secret: str | None,
        keyslot: int | None,
        iter_time: int | None,
        *,
        look_up: Callable[[str], bytes],
    ) -> Change:
        """What options ask for; ``look_up`` turns names of secrets into passphrases. Raises
        UsageError."""
        if state is None:
            raise UsageError("Parameter 'state' is missing", field="state")
        if state not in ("active", "inactive"):
            raise UsageError(f"Parameter 'state' does not accept value '{state}'", field="state")
        new = None if new_secret is None else look_up(new_secret)
        old = None if old_secret is None else look_up(old_secret)
        return cls(state, new, old, keyslot, iter_time)


def amend(header: Header, storage: Storage, key: bytes, change: Change, *, force: bool) -> None:
    """``key`` is the master key. Raises UsageError or Refused before anything is written."""
    if change.keyslot is not None and not 0 <= change.keyslot < SLOTS:
        raise UsageError(
            f"Invalid keyslot {change.keyslot} specified, must be between 0 and {SLOTS - 1}",
            field="keyslot",
        )
    if change.state == "active":
        _add(header, storage, key, change, force)
    else:
        for number in _to_erase(header, storage, change, force):
            _erase(header, storage, number)


def _add(header: Header, storage: Storage, key: bytes, change: Change, force: bool) -> None:
    if change.new_passphrase is None:
        raise UsageError("'new-secret' is required to activate a keyslot", field="new-secret")
    if change.old_passphrase is not None:
        raise UsageError(
            "'old-secret' must not be given when activating keyslots", field="old-secret"
        )
    number = change.keyslot
    if number is None:
        free = [number for number, slot in enumerate(header.slots) if not slot.active]
        if not free:
            raise Refused("Can't add a keyslot - all keyslots are in use")
        number = free[0]
    elif header.slots[number].active and not force:
        raise Refused(
            f"Refusing to overwrite active keyslot {number} - please erase it first"
        )
    iter_time = DEFAULT_ITER_TIME if change.iter_time is None else change.iter_time
    iterations = slot_iterations(header, iter_time)
    material = fill_slot(header, number, key, change.new_passphrase, iterations)
    storage.write(header.slots[number].offset, material)
    storage.flush()
    storage.write(0, header.pack())
    storage.flush()


def _to_erase(header: Header, storage: Storage, change: Change, force: bool) -> list[int]:
    if change.new_passphrase is not None:
        raise UsageError(
            "'new-secret' must not be given when erasing keyslots", field="new-secret"
        )
    if change.iter_time is not None:
        raise UsageError("'iter-time' must not be given when erasing keyslots", field="iter-time")
    active = [number for number, slot in enumerate(header.slots) if slot.active]
    number, old = change.keyslot, change.old_passphrase
    if number is not None:
        if number not in active and not force:
            raise UsageError(f"Given keyslot {number} is already erased (inactive) ")
        if old is not None and not _opens(header, storage, header.slots[number], old):
            raise Refused(
                f"Given keyslot {number} doesn't contain the given old password for erase operation"
            )
        if active == [number] and not force:
            raise Refused(f"Attempt to erase the only active keyslot {number} {_ALL_LOST}")
        return [number]
    if old is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given"
        )
    found = [number for number in active if _opens(header, storage, header.slots[number], old)]
    if not found:
        raise Refused("No keyslots match given (old) password for erase operation")
    if found == active and not force:
        raise Refused(
            "All the active keyslots match the (old) password that was given and erasing them "
            + _ALL_LOST.removeprefix("which ")
        )
    return found


def _opens(header: Header, storage: Storage, slot: KeySlot, passphrase: bytes) -> bool:
    spec = CipherSpec.of(header)
    return key_of_slot(header, spec, slot, passphrase, storage.read) is not None


def _erase(header: Header, storage: Storage, number: int) -> None:
    """The header first: a slot that is named must have its material."""
    slot = header.slots[number]
    header.slots[number] = KeySlot(offset=slot.offset)
    storage.write(0, header.pack())
    storage.flush()
    for _ in range(OVERWRITES):
        storage.write(slot.offset, os.urandom(round_up(header.material_bytes, SECTOR)))
        storage.flush()
