"""Key slots are added and erased, and the last one is not lost by accident."""

from __future__ import annotations

import copy

import pytest

from lamina.ciphers.luks import volume
from lamina.ciphers.luks.amend import Change, amend
from lamina.ciphers.luks.create import new_header
from lamina.ciphers.luks.header import SIZE, parse
from lamina.errors import LaminaError, Refused

KEY = bytes(range(64))


class Memory:
    def __init__(self) -> None:
        self.data = bytearray(2 << 20)
        self.flushed = True

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.flushed = False
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed = True


@pytest.fixture
def made():
    header = new_header(
        cipher_alg="aes-256",
        cipher_mode="xts",
        ivgen_alg="plain64",
        ivgen_hash_alg=None,
        hash_alg="sha256",
    )
    storage = Memory()
    volume.set_master_key(header, KEY, 1000)
    storage.write(header.slots[0].offset, volume.fill_slot(header, 0, KEY, b"first", 1000))
    storage.write(0, header.pack())
    return header, storage


def stored(storage):
    assert storage.flushed
    return parse(bytes(storage.data[:SIZE]))


def change(made, state="active", *, force=False, **rest):
    header, storage = made
    amend(header, storage, KEY, Change(state, **rest), force=force)


def test_a_second_passphrase_opens(made):
    change(made, new_passphrase=b"second", iter_time=1)
    assert volume.unlock(stored(made[1]), b"second", made[1].read) == (KEY, 1)
    assert volume.unlock(stored(made[1]), b"first", made[1].read) == (KEY, 0)


def test_an_erased_passphrase_is_gone(made):
    change(made, new_passphrase=b"second", iter_time=1)
    header, storage = made
    before = storage.read(header.slots[0].offset, 64 * 4000)
    change(made, "inactive", old_passphrase=b"first")
    assert storage.read(header.slots[0].offset, 64 * 4000) != before
    assert [slot.active for slot in stored(storage).slots[:3]] == [False, True, False]
    with pytest.raises(Refused):
        volume.unlock(stored(storage), b"first", storage.read)
    assert volume.unlock(stored(storage), b"second", storage.read) == (KEY, 1)


REFUSALS = [
    ({}, "'new-secret' is required to activate a keyslot"),
    ({"new_passphrase": b"x", "keyslot": 9}, "Invalid keyslot 9 specified"),
    ({"new_passphrase": b"x", "keyslot": 0}, "Refusing to overwrite active keyslot 0"),
    ({"new_passphrase": b"x", "old_passphrase": b"first"}, "'old-secret' must not be given"),
    ({"state": "inactive"}, "To erase keyslot"),
    ({"state": "inactive", "new_passphrase": b"x"}, "'new-secret' must not be given"),
    ({"state": "inactive", "keyslot": 0, "iter_time": 5}, "'iter-time' must not be given"),
    ({"state": "inactive", "keyslot": 5}, "Given keyslot 5 is already erased"),
    ({"state": "inactive", "keyslot": 0}, "Attempt to erase the only active keyslot 0"),
    ({"state": "inactive", "keyslot": 0, "old_passphrase": b"x"}, "doesn't contain the given old"),
    ({"state": "inactive", "old_passphrase": b"x"}, "No keyslots match"),
    ({"state": "inactive", "old_passphrase": b"first"}, "All the active keyslots match"),
]


@pytest.mark.parametrize(("rest", "message"), REFUSALS)
def test_refusals_write_nothing(made, rest, message):
    before = copy.copy(made[1].data)
    with pytest.raises(LaminaError, match=message):
        change(made, **rest)
    assert made[1].data == before


def test_all_slots_in_use(made):
    for _ in range(7):
        change(made, new_passphrase=b"more", iter_time=1)
    with pytest.raises(Refused, match="all keyslots are in use"):
        change(made, new_passphrase=b"more", iter_time=1)


def test_force_erases_the_last_one(made):
    change(made, "inactive", keyslot=0, force=True)
    assert not any(slot.active for slot in stored(made[1]).slots)
