"""Unlocking a LUKS1 volume: from a passphrase to the cipher of its sectors."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass

from lamina.ciphers import ivs, modes
from lamina.ciphers.blocks import KEY_SIZES
from lamina.ciphers.luks.header import Header, KeySlot
from lamina.ciphers.luks.keys import merge, pbkdf2, split
from lamina.errors import ImageUnsupported, Refused
from lamina.units import SECTOR, round_up

HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "md5", "sm3")
DIGEST_BYTES = 20
MIN_ITERATIONS = 1000

ReadAt = Callable[[int, int], bytes]
"""(offset from the header, length) -> bytes."""


@dataclass(frozen=True)
class CipherSpec:
    """The words of a header's cipher mode, taken apart: ``cbc-essiv:sha256``."""

    cipher: str
    mode: str
    iv: str
    iv_hash: str | None

    @classmethod
    def of(cls, header: Header) -> CipherSpec:
        """Raises ImageUnsupported for what no driver here can do, before any key is derived."""
        mode, dash, iv = header.mode.partition("-")
        if not dash and mode != "ecb":
            raise _unsupported(f"Unexpected cipher mode string format '{header.mode}'", 40)
        iv, colon, iv_hash = iv.partition(":")
        spec = cls(header.cipher, mode, iv or "plain", iv_hash if colon else None)
        if mode not in modes.MODES:
            raise _unsupported(f"Cipher mode '{mode}' not supported", 40)
        if spec.iv not in ("plain", "plain64", "essiv"):
            raise _unsupported(f"IV generator '{spec.iv}' not supported", 40)
        if header.hash not in HASHES:
            raise _unsupported(f"Hash algorithm '{header.hash}' not supported", 72)
        key_size = header.key_bytes // 2 if mode == "xts" else header.key_bytes
        if key_size not in KEY_SIZES.get(header.cipher, ()):
            raise _unsupported(
                f"Algorithm '{header.cipher}' with key size {key_size} bytes not supported", 8
            )
        if spec.iv == "essiv" and spec.iv_hash is None:
            raise _unsupported("Missing IV generator hash specification", 40)
        return spec

    def sectors(self, key: bytes) -> modes.SectorCipher:
        iv = ivs.generator(self.iv, self.iv_hash, self.cipher, key)
        return modes.MODES[self.mode](self.cipher, key, iv)


def unlock(header: Header, passphrase: bytes, read: ReadAt) -> tuple[bytes, int]:
    """The master key, and the number of the slot that gave it. Raises Refused."""
    spec = CipherSpec.of(header)
    for number, slot in enumerate(header.slots):
        if slot.active:
            key = key_of_slot(header, spec, slot, passphrase, read)
            if key is not None:
                return key, number
    raise Refused("Invalid password, cannot unlock any keyslot", format="luks")


def key_of_slot(
    header: Header, spec: CipherSpec, slot: KeySlot, passphrase: bytes, read: ReadAt
) -> bytes | None:
    """The master key, if ``passphrase`` opens this slot."""
    material = bytearray(round_up(header.material_bytes, SECTOR))
    stored = read(slot.offset, len(material))
    material[: len(stored)] = stored
    _slot_cipher(header, spec, slot, passphrase).decrypt(memoryview(material), 0)
    key = merge(bytes(material[: header.material_bytes]), header.key_bytes, header.hash)
    digest = pbkdf2(
        header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES
    )
    return key if hmac.compare_digest(digest, header.digest) else None


def set_master_key(header: Header, key: bytes, iterations: int) -> None:
    """Store the digest that tells a right key from a wrong one."""
    header.digest_salt = os.urandom(32)
    header.digest_iterations = max(iterations, MIN_ITERATIONS)
    header.digest = pbkdf2(
        header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES
    )


def fill_slot(
    header: Header, number: int, key: bytes, passphrase: bytes, iterations: int
) -> bytes:
    """Activate a slot of ``header``; returns the key material to be stored at its offset first."""
    slot = header.slots[number]
    slot.salt = os.urandom(32)
    slot.iterations = max(iterations, MIN_ITERATIONS)
    material = bytearray(round_up(header.material_bytes, SECTOR))
    material[: header.material_bytes] = split(key, header.hash)
    _slot_cipher(header, CipherSpec.of(header), slot, passphrase).encrypt(memoryview(material), 0)
    slot.active = True
    return bytes(material)


def _slot_cipher(
    header: Header, spec: CipherSpec, slot: KeySlot, passphrase: bytes
) -> modes.SectorCipher:
    slot_key = pbkdf2(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    return spec.sectors(slot_key)


def _unsupported(message: str, offset: int) -> ImageUnsupported:
    return ImageUnsupported(message, format="luks", structure="header", offset=offset)
